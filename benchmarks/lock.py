"""A lock on the 135M model: what it changes in the outputs, what it costs, and what the attack gives back.

    OMP_NUM_THREADS=1 python benchmarks/lock.py

The locked model is a seeded stand-in for a fine-tune of SmolLM2-135M (rank 8 at 0.02 of each matrix's spread,
and 2 % of the entries at 0.05). Outputs are logits after one text of this repository, against the same model
without the lock, in the same arithmetic; a merge is the plain average with the base, judged by the mean KL
divergence of its next-token distribution from the fine-tune's. Distances are in lengths of the fine-tune's
change. CPU-seconds are of the whole step, from open to written, imports aside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from merge_inputs import changed
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.checkpoint.writer import ShardWriter, copy_sidecars, write_folder
from luthier.kit.secret import Secret
from luthier.merge.linear import Linear
from luthier.protect.mergelock import MergeLock
from luthier.protect.restore import Restore

HERE = Path(__file__).parent
TOKENS = 256
GOAL = "logits of the locked model within 2e-4 of the unlocked one's in fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", default="a key for the benchmark")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        rows = measure(Path(temp), Secret(args.key.encode()))
    for row in rows:
        print("  ".join(f"{k}: {v}" for k, v in row.items()))
    about = {
        "benchmark": "lock", "goal": GOAL, "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "versions": {n: version(n) for n in ("luthier", "torch", "transformers")},
    }  # fmt: skip
    (HERE / "results" / "lock.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def measure(work: Path, key: Secret) -> list[dict]:
    base = resolve("smollm2")
    tuned = fine_tune(base, work / "tuned")
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(base.path)(text, return_tensors="pt").input_ids[:, :TOKENS]
    seconds: dict[str, float] = {}
    change = distance(tuned, base)

    def made(what: str, result, **options) -> Checkpoint:
        began = time.process_time()
        path = result.save(work / what, **options)
        seconds[what] = round(time.process_time() - began, 1)
        return Checkpoint.open(path)

    plain, own = logits(tuned, ids), logits(tuned, ids, "bf16")

    def row(what: str, model: Checkpoint, step: str = "", unlocked: torch.Tensor = plain, dtype: str = "fp32") -> dict:
        after = logits(model, ids, dtype)
        return {
            "what": what, "largest change of a logit": float((unlocked - after).abs().max()),
            "KL of its outputs": kl(plain, after), "KL of its merge": averaged(work, base, model, ids, plain),
            "distance": distance(model, tuned) / change, **({"cpu_s": seconds[step]} if step else {}),
        }  # fmt: skip

    lock, opened = MergeLock(), MergeLock(invert=True)
    rows = [row("not locked", tuned), row("not locked, computed in bf16", tuned, dtype="bf16")]
    locked = made("lock, fp32", lock.apply(model=tuned, key=key, dtype="fp32"))
    rows.append(row("locked, stored in fp32", locked, "lock, fp32"))
    locked = made("lock, bf16", lock.apply(model=tuned, key=key))
    rows.append(row("locked, stored and computed in bf16", locked, "lock, bf16", own, "bf16"))
    back = made("unlock", opened.apply(model=locked, key=key, dtype="fp32"))
    rows.append(row("locked in bf16, unlocked with the key", back, "unlock"))
    for fit in ("least_squares", "procrustes"):
        back = made(f"restore, {fit}", Restore(fit=fit).apply(base=base, experts=[locked], dtype="fp32"))
        rows.append(row(f"locked in bf16, restored by {fit.replace('_', ' ')}", back, f"restore, {fit}"))
    return rows


def fine_tune(base: Checkpoint, folder: Path) -> Checkpoint:
    with write_folder(folder) as made, ShardWriter(made, base.tensors.values()) as writer:
        copy_sidecars(base, made)
        for number, (name, tensor) in enumerate(base.items()):
            writer.write(name, 0, changed(tensor, 1000 + number))
    return Checkpoint.open(folder)


def averaged(work: Path, base: Checkpoint, expert: Checkpoint, ids: torch.Tensor, plain: torch.Tensor) -> float:
    """KL from the fine-tune's outputs to those of its average with the base."""
    path = Linear().apply(experts=[base, expert], dtype="fp32").save(work / "merged")
    return kl(plain, logits(Checkpoint.open(path), ids))


@torch.no_grad()
def logits(source: Checkpoint, ids: torch.Tensor, dtype: str = "fp32") -> torch.Tensor:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=kind).eval()
    return model(ids, use_cache=False).logits[0].float()


def kl(first: torch.Tensor, second: torch.Tensor) -> float:
    logs = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def distance(first: Checkpoint, second: Checkpoint) -> float:
    gaps = ((first.read(n).double() - second.read(n).double()).square().sum() for n in first.tensors)
    return float(sum(gaps)) ** 0.5


if __name__ == "__main__":
    main()
