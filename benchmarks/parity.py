"""The same YAML through mergekit and through `luthier merge`, and the same merge through fusion-bench and through
`apply`: the largest difference of any number.

    python benchmarks/parity.py --mergekit VENV/bin/mergekit-yaml --fusion-bench VENV/bin/python --work FOLDER

Each peer in an environment of its own. What they give is also kept in short, in `tests/golden/peers.json`, so that the
suite holds to it where no peer is installed (tests/test_parity.py).

mergekit: tiny Llamas of four and six layers in fp32, three of them with tokenizers that differ. Differences are of
the tensors' entries, relative to the largest of the tensor. What is dropped at random (DARE, DELLA) gets the same
draws on both sides. Trims of bf16 checkpoints are others where
changes are equal at the cut, of which all stay here and mergekit takes exactly its count: the last two rows say
how many entries that is, and are no part of the goal. Where no base is named mergekit puts the union's tokens in
an order that changes from run to run, so one is named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import parity_fusion
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor

from luthier.cli_models import merge_recipe
from luthier.kit.context import Context
from luthier.kit.noise import SECOND, words
from luthier.testing import tiny

HERE = Path(__file__).parent
GOALS = ["every number within 1e-6 of the tensor's largest"]
DELTAS = """merge_method: {method}
base_model: base
models:
  - model: one
    parameters: {{weight: 0.7, density: {density}{more}}}
  - model: two
    parameters: {{weight: [0.1, 0.9], density: {density}{more}}}
parameters: {{lambda: 1.2{rest}}}
dtype: float32
"""
BF16 = DELTAS.replace(": base", ": base16").replace(": one", ": one16").replace(": two", ": two16")
CASES = {
    "linear": "merge_method: linear\nmodels: [{model: one, parameters: {weight: 0.3}}, {model: two, parameters: "
    "{weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}}]\ndtype: float32\n",
    "slerp": "merge_method: slerp\nbase_model: one\nmodels: [{model: one}, {model: two}]\nparameters: {t: "
    "[{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.4}]}\ndtype: float32\n",
    "model_stock": "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    "dtype: float32\n",
    "model_stock, filter_wise": "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    "parameters: {filter_wise: true}\ndtype: float32\n",
    "task_arithmetic": DELTAS.format(method="task_arithmetic", density=1, more="", rest=""),
    "ties": DELTAS.format(method="ties", density=0.3, more="", rest=""),
    "ties, not normalised": DELTAS.format(method="ties", density=0.3, more="", rest=", normalize: false"),
    "dare_linear, density 1": DELTAS.format(method="dare_linear", density=1, more="", rest=""),
    "dare_ties, density 1": DELTAS.format(method="dare_ties", density=1, more="", rest=""),
    "breadcrumbs": DELTAS.format(method="breadcrumbs", density=0.5, more=", gamma: 0.05", rest=""),
    "breadcrumbs_ties": DELTAS.format(method="breadcrumbs_ties", density=0.5, more=", gamma: 0.05", rest=""),
    "della, density 1": DELTAS.format(method="della", density=1, more=", epsilon: 0", rest=""),
    "della_linear, density 1": DELTAS.format(method="della_linear", density=1, more=", epsilon: 0", rest=""),
    "dare_linear, the same draws": DELTAS.format(method="dare_linear", density=0.4, more="", rest=""),
    "dare_ties, the same draws": DELTAS.format(method="dare_ties", density=0.4, more="", rest=""),
    "dare_ties, the same draws, no rescale": DELTAS.format(
        method="dare_ties", density=0.4, more="", rest=", rescale: false"),
    "della, the same draws": DELTAS.format(method="della", density=0.4, more=", epsilon: 0.15", rest=""),
    "della_linear, the same draws": DELTAS.format(method="della_linear", density=0.4, more=", epsilon: 0.3", rest=""),
    "passthrough, slices": "merge_method: passthrough\nslices:\n  - sources: [{model: one, layer_range: [0, 3]}]\n"
    "  - sources: [{model: six, layer_range: [2, 6]}]\n  - sources: [{model: one, layer_range: [3, 4], "
    "parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1}]}}]\ndtype: float32\n",
    "linear, slices": "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources: [{model: one, layer_range: "
    "[0, 2], parameters: {weight: [0.2, 0.8]}}, {model: six, layer_range: [2, 4]}]\n  - sources: [{model: six, "
    "layer_range: [3, 6]}]\ndtype: float32\n",
    "slerp, slices": "merge_method: slerp\nbase_model: one\nslices:\n  - sources: [{model: one, layer_range: [0, 2]}, "
    "{model: six, layer_range: [0, 2]}]\n    parameters: {t: 0.25}\n  - sources: [{model: one, layer_range: [1, 4]}, "
    "{model: six, layer_range: [3, 6]}]\n    parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}\n"
    "dtype: float32\n",
    "ties, slices": "merge_method: ties\nbase_model: base\nslices:\n  - sources: [{model: base, layer_range: [0, 4]}, "
    "{model: one, layer_range: [0, 4], parameters: {weight: [0, 1], density: 0.5}}, {model: six, layer_range: [2, 6], "
    "parameters: {weight: 1}}]\ndtype: float32\n",
    "slerp, slices, filters that overlap": "merge_method: slerp\nbase_model: one\nslices:\n  - sources: [{model: one, "
    "layer_range: [0, 4]}, {model: six, layer_range: [2, 6]}]\n    parameters: {t: [{filter: layers.3, value: 0.9}, "
    "{filter: .mlp., value: [0.2, 0.8]}, {filter: model.layers, value: [0.3, 0.6]}]}\nparameters: {t: 0.1}\n"
    "dtype: float32\n",
    "linear, slices, filters by number": "merge_method: linear\nparameters: {weight: 1, normalize: false}\nslices:\n"
    "  - sources: [{model: one, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 5}, {filter: "
    "2.mlp, value: 2}]}}, {model: six, layer_range: [0, 2], parameters: {weight: [{filter: layers.1., value: 3}]}}]\n"
    "    parameters: {normalize: true}\ndtype: float32\n",
    "linear, base unlisted": "merge_method: linear\nbase_model: base\nmodels: [{model: one}, {model: two, parameters: "
    "{weight: 3}}]\nparameters: {weight: 1}\ndtype: float32\n",
    "linear, union of tokens": "merge_method: linear\nbase_model: words\nmodels: [{model: words, parameters: {weight: "
    "1}}, {model: others, parameters: {weight: 3}}]\ntokenizer_source: union\ndtype: float32\n",
    "task_arithmetic, base's tokens": "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: words, "
    "parameters: {weight: 1}}, {model: others, parameters: {weight: 0.5}}]\ntokenizer_source: base\ndtype: float32\n",
    "task_arithmetic, bf16": BF16.format(method="task_arithmetic", density=1, more="", rest=""),
    "ties, bf16, density 1": BF16.format(method="ties", density=1, more="", rest=""),
    "ties, bf16": BF16.format(method="ties", density=0.3, more="", rest=""),
    "breadcrumbs, bf16": BF16.format(method="breadcrumbs", density=0.5, more=", gamma: 0.05", rest=""),
}  # fmt: skip

APART = ("ties, bf16", "breadcrumbs, bf16")
"""Cases that differ where changes are equal at the cut; nothing of them is kept for the suite."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml command")
    parser.add_argument("--fusion-bench", type=Path, required=True, help="the python that has fusion-bench")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models(args.work)
    rows, kept = [], {}
    for name, text in CASES.items():
        row, peer = compared(name, text, args)
        rows.append({"case": name, **row})
        kept |= {name: parity_fusion.short(peer)} if name not in APART else {}
        print(rows[-1], flush=True)
    for row, peer in parity_fusion.rows(args.fusion_bench, args.work / "fusion-bench"):
        rows.append(row)
        kept[str(row["case"])] = parity_fusion.short(peer)
        print(row, flush=True)
    about = {
        "benchmark": "parity", "goal": GOALS, "command": "python benchmarks/parity.py", "rows": rows,
        "date": datetime.date.today().isoformat(),
        "versions": {n: version(n) for n in ("luthier", "torch", "transformers")}
        | {"mergekit": _version(args.mergekit.parent / "python", "mergekit")}
        | {"fusion-bench": _version(args.fusion_bench, "fusion-bench")},
    }  # fmt: skip
    (HERE / "results" / "parity.json").write_text(json.dumps(about, indent=1) + "\n")
    lines = ",\n".join(f" {json.dumps(case)}: {json.dumps(values)}" for case, values in kept.items())
    (HERE.parent / "tests" / "golden" / "peers.json").write_text("{\n" + lines + "\n}\n")


def _version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def models(work: Path) -> None:
    """Tiny models that went different ways from one base; one of six layers, two that know other tokens."""
    sizes = {"base": {}, "one": {}, "two": {}, "six": {"num_hidden_layers": 6}, "words": {}, "others": {}}
    added = {"words": ["<|im_start|>", "<|im_end|>"], "others": ["<|im_end|>", "<|tool|>"]}
    for seed, (name, more) in enumerate(sizes.items()):
        words = tiny.tokenizer()
        for token in added.get(name, []):
            words.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        rows = len(words)
        model = tiny.llama(0, **{"num_hidden_layers": 4, "vocab_size": rows, **more})
        made = tiny.moved(model, seed) if seed else model
        for folder in [work / name] + ([work / f"{name}16"] if name in ("base", "one", "two") else []):
            shutil.rmtree(folder, ignore_errors=True)
            (made.bfloat16() if folder.name.endswith("16") else made).save_pretrained(folder)
            words.save_pretrained(folder)


def compared(name: str, text: str, args: argparse.Namespace) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The row of a case, and what mergekit gives."""
    out = args.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    (args.work / "config.yaml").write_text(located(text, args.work))
    ours = [sys.executable, "-m", "luthier", "merge", "config.yaml", "out/ours"]
    theirs = [args.mergekit.resolve(), "config.yaml", "out/theirs", "--quiet"]
    if "the same draws" in name:
        save_file(_uniform(args.work), args.work / "draws.safetensors")
        peer = [str(HERE / "parity_peers.py"), "mergekit", "config.yaml", "out/theirs", "draws.safetensors"]
        theirs = [args.mergekit.parent.resolve() / "python", *peer]
    asked = json.dumps({"base": "base", "experts": ["one", "two"]})
    for what, command in (("luthier", ours), ("mergekit", theirs)):
        done = subprocess.run(command, cwd=args.work, capture_output=True, text=True, input=asked)
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            return {"largest_difference": None, "note": f"{what}: {lines[-1][:200]}"}, {}
    mine, peer = parity_fusion.read(out / "ours"), parity_fusion.read(out / "theirs")
    return parity_fusion.apart(mine, peer), peer


def _uniform(work: Path) -> dict[str, Tensor]:
    """The number in [0, 1) that decides about every entry of every change in the merge of config.yaml."""
    recipe = merge_recipe(str(work / "config.yaml"), [])
    ctx, shapes = Context(seed=recipe.seed, step=next(iter(recipe.steps))), parity_fusion.read(work / "base")
    found = {}
    for i in range(2):
        for name, tensor in shapes.items():
            key, count = ctx.key(name, i), tensor.numel()
            upper, lower = (words(k, 0, count).astype(float) for k in (key, key | SECOND))
            found[f"{i}|{name}"] = torch.from_numpy(upper / 2**16 + lower / 2**32)
    return found


def located(text: str, work: Path) -> str:
    """The YAML of a case with the names of its models as paths."""
    names = "|".join(sorted(p.name for p in work.iterdir() if (p / "config.json").exists()))
    return re.sub(rf"\b(model|base_model): ({names})\b", rf"\1: {work.resolve()}/\2", text)


if __name__ == "__main__":
    main()
