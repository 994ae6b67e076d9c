"""Curse of depth: the paper (arXiv 2502.05795, sections 3 and 4) finds that under pre-norm the residual stream's
variance grows with depth until deep layers hardly act, and that LayerNorm Scaling holds it down.

Here: 20 thin layers from scratch, probed after training on windows of test files. The value is the
logarithm of the last layer's variance over the first one's, of LNS. Controls: pre-norm, and all layers
scaled by LNS's mean scale. Reported and not judged: the deeper half's Jacobian and loss without a layer.
"""

import math

from luthier.claims import Claim, _scratch
from luthier.claims._bundled import Host
from luthier.claims._deep import ARMS, trained
from luthier.kit.context import Context
from luthier.probe.curse_of_depth import CurseOfDepth
from luthier.testing.tiny import TinyData, item

WINDOWS = 16


class Bytes:
    """A tokenizer whose tokens are bytes."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("latin-1"))}


def run(seed: int, ctx: Context) -> dict[str, float]:
    drawn = _scratch.windows(_scratch.corpus()[1], WINDOWS, ctx.with_(seed=seed).rng("probed"))
    texts = [item(text=bytes(row.tolist()).decode("latin-1")) for row in drawn]
    found: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        subject = Host(arm, trained(arm, seed)[0].eval(), Bytes())
        table = CurseOfDepth().measure([subject], [TinyData("code", (), texts)], ctx)
        found[arm] = {row["metric"]: row["value"] for row in table.where(layer=None)}
    growth = {arm: math.log(values["variance growth"]) for arm, values in found.items()}
    others = {
        f"{metric}, {arm}": found[arm][metric]
        for metric in ("jacobian, deeper half", "drop, deeper half", "angular, deeper half") for arm in ARMS
    }  # fmt: skip
    return {
        "method": growth["LNS"], "control/pre-norm": growth["pre-norm"],
        "control/constant scale": growth["constant scale"], **others, "cost/forwards": float(len(ARMS) * 23),
    }  # fmt: skip


CLAIM = Claim(
    id="probe.curse_of_depth",
    sentence="In 20 trained thin layers the residual variance grows with depth by a factor smaller by e^0.5 under LNS"
    " than under pre-norm, and than under a constant scale.",
    relation="below", effect=0.5, unit="log of last over first layer's variance",
    control="pre-norm; all layers scaled by LNS's mean", seeds=5, minutes=8, run=run,
    source="2502.05795: sections 3 and 4",
)  # fmt: skip
