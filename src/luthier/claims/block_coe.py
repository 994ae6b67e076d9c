"""Chain of experts: the paper (arXiv 2506.18945, figure 1 and section 4) finds a validation loss of 1.12 nats a
token against 1.20 at equal routed compute, two passes through K/2 experts against one through K, after 1000
steps, from one seed and about a hundred texts. Its MoE baseline has the layer of its chain, which keeps no
residual stream.

Here: the shipped recipe `coe-vs-moe`, small decoders on texts of word problems, 150 steps. The chain in the
released layer is judged against MoE in that layer, and against MoE in a pre-norm layer, which is another layer than
the chain's. Published beside them and not judged: MoE less chain where both have the pre-norm layer. Reported: the
differences at equal time, over the last 20 steps each training had done when the faster was finished. How long a
step takes is measured apart: all arms take one in turn, round after round, since trainings that follow one another
meet the machine in different moods.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier import run as run_recipe
from luthier.claims import Claim
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.recipe import find
from luthier.recipe_text import read
from luthier.report import summary

ARMS = ("moe", "coe", "moe-prenorm", "coe-prenorm")
WINDOW = 20
ROUNDS = 30


def run(seed: int, ctx: Context) -> dict[str, float]:
    recipe = read(find("coe-vs-moe")).value
    for step in recipe["steps"].values():
        step["vary"] = {"seed": [seed]}
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(recipe, folder=Path(folder) / "coe-vs-moe")
        shown = summary(Path(folder) / "coe-vs-moe")
    loss = {arm: shown_loss(shown.measures, f"{arm}@seed={seed}") for arm in ARMS}
    curves = {arm: shown.histories[f"{arm}@seed={seed}"] for arm in ARMS}
    counts = {r.base: r.metrics for r in shown.records if r.base in ARMS}
    pace, pace_prenorm = paces(recipe["steps"])
    return {
        "method": loss["coe"], "control/MoE in the released layer": loss["moe"],
        "control/MoE in a pre-norm layer": loss["moe-prenorm"], "CoE, pre-norm": loss["coe-prenorm"],
        "also/MoE less CoE, both in a pre-norm layer": loss["moe-prenorm"] - loss["coe-prenorm"],
        "at equal time, CoE less MoE": at_equal_time(curves["moe"], curves["coe"], pace),
        "at equal time, CoE less MoE, pre-norm": at_equal_time(
            curves["moe-prenorm"], curves["coe-prenorm"], pace_prenorm
        ),
        "time, CoE over MoE": 1 / pace, "time, CoE over MoE, pre-norm": 1 / pace_prenorm,
        "cost/tokens": counts["coe"]["tokens"], "cost/FLOPs a token": counts["coe"]["flops_per_token"],
        "cost/FLOPs a token of MoE": counts["moe"]["flops_per_token"],
        "cost/parameters": counts["coe"]["trainable"], "cost/parameters of MoE": counts["moe"]["trainable"],
    }  # fmt: skip


def shown_loss(rows: Sequence[Mapping[str, Any]], model: str) -> float:
    return next(row["mean"] for row in rows if row["model"] == model)


def paces(steps: Mapping[str, Any]) -> tuple[float, float]:
    """Steps of the chain while MoE takes one, in the released and in the pre-norm layer: medians over rounds in
    which every arm takes a step on the same batch."""
    train, size = steps["moe"]["train"], steps["moe"]["model"]["tokenizer"]["size"]
    words = torch.Generator().manual_seed(0)
    batch = torch.randint(0, size, (train["batch"], train["max_length"]), generator=words)
    models = {arm: build_model({"vocab_size": size, **steps[arm]["model"]["new"]}, 0).train() for arm in ARMS}
    optims = {arm: torch.optim.AdamW(model.parameters(), lr=train["lr"]) for arm, model in models.items()}

    def step(arm: str) -> float:
        began = time.perf_counter()
        models[arm](batch, labels=batch).loss.backward()
        optims[arm].step()
        optims[arm].zero_grad()
        return time.perf_counter() - began

    rounds = [{arm: step(arm) for arm in ARMS} for _ in range(ROUNDS + 1)][1:]
    released, prenorm = (statistics.median(t[moe] / t[coe] for t in rounds) for moe, coe in (ARMS[:2], ARMS[2:]))
    return released, prenorm


def at_equal_time(moe: Sequence[Mapping[str, Any]], coe: Sequence[Mapping[str, Any]], pace: float) -> float:
    """Training loss of the chain less the mixture's, when the faster of them has taken all its steps.

    Each over the last steps it had done by then, WINDOW of them or as many as there are.  pace: steps of the chain
    while the mixture takes one.
    """
    ends = round(len(moe) * min(1.0, 1 / pace)), round(len(coe) * min(1.0, pace))
    ours, theirs = (
        statistics.mean(row["terms"]["nll"] for row in curve[: max(1, end)][-WINDOW:])
        for curve, end in zip((coe, moe), ends[::-1], strict=True)
    )
    return ours - theirs


CLAIM = Claim(
    id="block.coe",
    sentence="In the released layer, without a residual stream, and at equal routed compute, two passes through two "
    "experts have a loss 0.02 lower than one pass through four, in that layer and in a pre-norm one.",
    relation="below", effect=0.02, unit="nats per token",
    control="MoE (one pass) in the released layer; MoE in a pre-norm layer",
    seeds=5, minutes=10, run=run, source="figure 1 and section 4: CoE(C=2, K=4) against MoE(K=8) of 64 experts",
)  # fmt: skip
