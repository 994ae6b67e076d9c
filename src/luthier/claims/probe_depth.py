"""Depth: that a small angular distance does not make a layer dispensable, so that measured harm is needed.

Here: the 135M model, each of its 30 layers skipped in turn, on windows of Python source. The value is
Spearman's correlation, over the layers, of the angle with the harm done to the same windows. The control
says what a good predictor would reach: the correlation with the harm done to other windows.
"""

from luthier.claims import Claim
from luthier.claims._bundled import Host, data
from luthier.kit.context import Context
from luthier.kit.stats import spearman
from luthier.probe.depth import Depth
from luthier.testing.tiny import TinyData

ITEMS = 5


def run(seed: int, ctx: Context) -> dict[str, float]:
    code = data("code", seed, "text:stdlib", 2 * ITEMS, chars=300, glob="[a-d]*.py").test
    tables = [
        Depth(protocols=("nll",)).measure([Host()], [TinyData("code", (), half)], ctx)
        for half in (code[:ITEMS], code[ITEMS:])
    ]  # fmt: skip
    harm, again = ([r["change"] for r in t.where(metric="nll") if r["layer"] is not None] for t in tables)
    angle = [r["value"] for r in tables[0].where(metric="angular")]
    deep = angle.index(min(angle[1:-1]))
    return {
        "method": spearman(angle, harm) or 0.0, "control": spearman(again, harm) or 0.0,
        "harm of layer 0": harm[0], "harm of layer 11": harm[11], "harm of the smallest angle": harm[deep],
        "median harm": sorted(harm)[len(harm) // 2], "cost/forwards": 2.0 * (len(harm) + 2),
    }  # fmt: skip


CLAIM = Claim(
    id="probe.depth",
    sentence="Over the layers, the angle's rank correlation with the harm of skipping is lower by 0.2 than that of harm"
    " measured on other text.",
    relation="below", effect=0.2, unit="Spearman's correlation", control="harm of the same skips on other windows",
    seeds=5, minutes=8, run=run, source="2510.02091: section 2; the angle is 2403.17887's",
)  # fmt: skip
