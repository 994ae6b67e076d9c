"""GPTailor: the paper (arXiv 2506.20480) finds that cutting layers and taking or merging the rest from tuned variants,
by search, keeps clearly more than dropping layers by block influence (ShortGPT).

Here: two of eight layers of a small decoder go; two variants, each tuned to one of its two tasks; sixty trials of
thirty-two items, the loss of each task an objective. Controls: as many random trials after the same designs; layers
dropped by influence; the block of them across which the stream turns least. Reported and not judged: a search over
removal alone, which the paper has as an ablation; the same search by successive halving, where a trial sees all items
only if it does well on the first eight; and how many answers are right.
"""

import tempfile
from pathlib import Path

from luthier.claims import Claim
from luthier.claims import _layers as layers
from luthier.compress.drop import Drop
from luthier.compress.gptailor import Gptailor
from luthier.kit.context import Context

TRIALS, FIRST = 60, 8


def run(seed: int, ctx: Context) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bench = layers.Bench(seed, ctx, Path(folder))
        return layers.told({
            "method": bench.cut(Gptailor(layers=layers.GONE), trials=TRIALS),
            "control/random search": bench.cut(Gptailor(layers=layers.GONE, sampler="random"), trials=TRIALS),
            "control/block influence": bench.cut(Drop(layers=layers.GONE)),
            "control/contiguous by angle": bench.cut(Drop(layers=layers.GONE, by="angular")),
            "by halving": bench.cut(Gptailor(layers=layers.GONE), trials=TRIALS, first=FIRST),
            "removal alone": bench.cut(Gptailor(layers=layers.GONE, pick="base"), trials=TRIALS),
        }) | {"cost/trials": float(TRIALS), "cost/items a trial": float(2 * layers.SEARCH_ITEMS)}  # fmt: skip


CLAIM = Claim(
    id="compress.gptailor",
    sentence="A search over cutting, taking and merging layers of tuned variants leaves a lower loss than random "
    "search of the same budget and than dropping as many layers by influence or angle.",
    relation="below", effect=0.02, unit="nats a token of the answers",
    control="random search of the same budget; block influence; a contiguous block by angle", seeds=5, minutes=4,
    run=run, source="2506.20480: Tables against ShortGPT at equal removal",
)  # fmt: skip
