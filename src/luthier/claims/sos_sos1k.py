"""sos.sos1k: six criteria that any reader can follow decide most of SoS-1K, and never wrongly, without a solver.

Polynomials of all 19 classes, drawn anew, five of each, up to 400 characters, with certified answers. A criterion that
decides gives a proof, so what it decides is right; what is undecided counts half, as a drawn answer does on average.
The control is the answer drawn for everything, scored on the same polynomials as its expectation, 1/2 (for the commoner
answer of these: reported). Reported too: the share that the solver decides with no criterion before it, and how much
of the time of one the other takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from luthier.claims import Claim
from luthier.engine.data import open_data
from luthier.kit.context import Context
from luthier.kit.sos1k import SIZES, truth
from luthier.sos.sos1k import Cascade

EACH, CHARS = 5, 400


def run(seed: int, ctx: Any) -> Mapping[str, float]:
    many = EACH * len(SIZES)
    spec = {"source": "sos1k:plain", "set": {"chars": CHARS, "equal": True}, "split": {"train": 0, "test": many}}
    data: Any = open_data("sos", spec, Context(seed=seed))
    ways = {"six": Cascade(certifier=None), "solver": Cascade(criteria=())}
    right: dict[str, float] = {}
    spent: dict[str, float] = {}
    for name, way in ways.items():
        began = time.process_time()
        said = [truth(way.certify(item.meta["problem"], ctx)) for item in data.test]
        spent[name] = time.process_time() - began
        pairs = zip(said, data.test, strict=True)
        right[name] = sum(0.5 if s is None else float(("No", "Yes")[s] == i.answer) for s, i in pairs) / many
        right[f"{name}, decided"] = sum(s is not None for s in said) / many
    yes = sum(item.answer == "Yes" for item in data.test) / many
    return {
        "method": right["six"], "control": 0.5, "the commoner answer": max(yes, 1 - yes),
        "decided by the criteria": right["six, decided"], "decided by the solver alone": right["solver, decided"],
        "accuracy of the solver alone": right["solver"], "time against the solver's": spent["six"] / spent["solver"],
        "cost/polynomials left out": float(sum(data.dropped.values())), "cost/polynomials": float(many),
    }  # fmt: skip


CLAIM = Claim(
    id="sos.sos1k",
    sentence="Of polynomials of all classes of SoS-1K, criteria without a solver answer 0.2 more rightly than a draw.",
    relation="above", effect=0.2, unit="share of answers", control="an answer drawn at random",
    seeds=5, minutes=3, run=run, source="section 2.1: five criteria; footnote 1: 50 % by guessing",
)  # fmt: skip
