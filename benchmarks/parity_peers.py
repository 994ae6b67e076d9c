"""Merges of the peers in their own environments; run by parity.py, which never imports them.

    PYTHON parity_peers.py mergekit CONFIG OUT DRAWS < '{"base": FOLDER, "experts": [FOLDER, ..]}'
    PYTHON parity_peers.py fusion-bench < '{"base": FOLDER, "experts": [FOLDER, ..], "out": FILE, "call": "ties", ..}'

mergekit runs as its command does, but where it draws an entry's fate it compares our uniform number of that entry with
its own probability: DRAWS has one tensor of them for each expert and tensor.

fusion-bench: each of `CALLS` hands it what its own algorithm class asks for, or, where the class wants a trainer or a
fabric of devices, the function that the class calls. What depends on drawn numbers gets ours, as masks in a file.
Everything runs in double precision and leaves in single.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    asked = json.load(sys.stdin)
    if sys.argv[1] == "mergekit":
        mergekit(asked, *sys.argv[2:])
    else:
        fusion_bench(asked)


def mergekit(asked, config, out, draws):  # noqa: ANN001, ANN201 (no annotation of ours is read here)
    from mergekit import sparsify
    from mergekit.merge_methods import generalized_task_arithmetic as family
    from mergekit.scripts.run_yaml import main as run

    base, *experts = (load_file(f"{folder}/model.safetensors") for folder in (asked["base"], *asked["experts"]))
    changes = {f"{i}|{n}": expert[n] - base[n] for i, expert in enumerate(experts) for n in base}
    uniform, drawn = load_file(draws), []

    def known(tensor, **fields):  # noqa: ANN001, ANN003, ANN202
        """mergekit names no tensor where it draws: it is the change that is equal."""
        drawn[:] = [next(n for n, c in changes.items() if c.shape == tensor.shape and torch.equal(c, tensor))]
        return sparsify.sparsify(tensor, **fields)

    family.sparsify = known
    torch.bernoulli = lambda chance: (uniform[drawn[0]].view(chance.shape) < chance).to(chance.dtype)
    run([config, out, "--quiet"], standalone_mode=False)


def fusion_bench(asked):  # noqa: ANN001, ANN201
    from transformers import AutoModelForCausalLM

    base, *experts = (AutoModelForCausalLM.from_pretrained(f).double() for f in (asked["base"], *asked["experts"]))
    with contextlib.redirect_stdout(sys.stderr):
        made = CALLS[asked["call"]](base, experts, asked)
    save_file({n: t.detach().float().contiguous() for n, t in made.items()}, asked["out"])


def _pool(base, experts):  # noqa: ANN001, ANN202
    from fusion_bench import BaseModelPool

    return BaseModelPool({"_pretrained_": base, **{f"expert_{i}": m for i, m in enumerate(experts)}})


def _by(name):  # noqa: ANN001, ANN202
    """The algorithm class of this name, with the fields that are given, run on a pool of the models."""

    def call(base, experts, asked):  # noqa: ANN001, ANN202
        import fusion_bench.method as methods

        return getattr(methods, name)(**asked["fields"]).run(_pool(base, experts)).state_dict()

    return call


def _changes(base, experts):  # noqa: ANN001, ANN202
    from fusion_bench.utils.state_dict_arithmetic import state_dict_sub

    return [state_dict_sub(m.state_dict(), base.state_dict()) for m in experts]


def _added(base, change, scale):  # noqa: ANN001, ANN202
    return {n: t + scale * change[n] for n, t in base.state_dict().items()}


@torch.no_grad()
def iso(base, experts, asked):  # noqa: ANN001, ANN201
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts

    changes, common = _changes(base, experts), asked["fields"].get("common_space_fraction")
    if common is None:
        return _added(base, iso_c(changes, accelerator="cpu"), asked["fields"]["scaling_factor"])
    return _added(base, iso_cts(changes, common, accelerator="cpu"), asked["fields"]["scaling_factor"])


@torch.no_grad()
def tsv(base, experts, asked):  # noqa: ANN001, ANN201
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    made = TSVM_utils.compute_and_sum_svd_mem_reduction(_changes(base, experts), exclude_keys=[], accelerator="cpu")
    return _added(base, made, asked["fields"]["alpha"])


def dare(base, experts, asked):  # noqa: ANN001, ANN201
    """Where the class draws, it is given 1 for what stays in ours and 0 for the rest: expert by expert, by tensor."""
    masks = load_file(asked["masks"])
    order = iter([masks[f"{i}|{n}"] for i, m in enumerate(experts) for n, _ in m.named_parameters()])
    torch.rand_like = lambda like: next(order).view(like.shape).to(like)
    return _by("DareTaskArithmetic")(base, experts, asked)


def _trainer(rows):  # noqa: ANN001, ANN202
    """What `regmean_merging` asks of a trainer: batches of one row."""
    batches = [{"input_ids": torch.tensor([row["ids"]])} for row in rows]
    return types.SimpleNamespace(
        get_train_dataloader=lambda: batches, _train_batch_size=1, _prepare_inputs=lambda batch: batch
    )


def regmean(base, experts, asked):  # noqa: ANN001, ANN201
    from fusion_bench.method.regmean.regmean import regmean_merging

    rows = asked["rows"]
    return regmean_merging(experts, [_trainer(r) for r in rows], [], [len(r) for r in rows], **asked["fields"])


def fisher(base, experts, asked):  # noqa: ANN001, ANN201
    """Squared gradients of the given labels' likelihood by torch, squared and weighed by fusion-bench: its own
    likelihood sums sqrt(p) log p over labels before it squares, which is no Fisher."""
    from fusion_bench.method.fisher_merging.fisher_merging import (
        get_param_squared_gradients,
        merging_with_fisher_weights,
    )

    names, found = [n for n, _ in base.named_parameters()], []
    for model, rows in zip(experts, asked["rows"], strict=True):
        total = dict.fromkeys(names, 0.0)
        for row in rows:
            model.zero_grad()
            logits, labels = model(input_ids=torch.tensor([row["ids"]])).logits[0], torch.tensor(row["labels"])
            torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").backward()
            squares = get_param_squared_gradients(model, names)
            total = {n: total[n] + squares[n] for n in names}
        found.append({n: t / len(rows) for n, t in total.items()})
    values = {n: [m.get_parameter(n).detach() for m in experts] for n in names}
    return merging_with_fisher_weights(values, found, torch.ones(len(experts)) / len(experts), **asked["fields"])


CALLS = {
    "average": _by("SimpleAverageAlgorithm"), "weighted": _by("WeightedAverageAlgorithm"),
    "task_arithmetic": _by("TaskArithmeticAlgorithm"), "ties": _by("TiesMergingAlgorithm"),
    "slerp": _by("SlerpMergeAlgorithm"), "model_stock": _by("ModelStock"),
    "dare": dare, "iso": iso, "tsv": tsv, "regmean": regmean, "fisher": fisher,
}  # fmt: skip


if __name__ == "__main__":
    main()
