"""A slice of `benchmarks/sos.py --random`: polynomials of known kinds get true verdicts, and what must be found is."""

import dataclasses
import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from luthier.kit import gram
from luthier.kit.context import Context
from luthier.kit.planted import generator
from luthier.sos.certify import SumOfSquares
from luthier.sos.dsos import Diagonal

PATH = Path(__file__).parents[1] / "benchmarks" / "sos_random.py"
SPEC = importlib.util.spec_from_file_location("sos_random", PATH)
randoms = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(randoms)
FIRST, COUNT = 2_000_000, 60
"""numbers that the benchmark does not reach"""


def test_no_mistake():
    found = randoms.many(COUNT, FIRST)
    assert found["mistakes"] == []
    assert found["verdicts"]["inside"] == {"exact": COUNT // 6}
    assert all(sum(found["verdicts"][kind].values()) == COUNT // 6 for kind in randoms.KINDS)
    assert {"exact", "not_sos"} <= {status for counts in found["verdicts"].values() for status in counts}


def test_the_cheap_cones_make_none_either():
    """What they do not prove is unknown, and no mistake."""
    for number in range(FIRST, FIRST + COUNT):
        kind, p, _ = randoms.drawn(number)
        made = Diagonal().certify(p, Context())
        fault = randoms.mistake("random" if made.status == "unknown" else kind, p, made)
        assert not fault, (number, fault)


def test_polynomials_are_of_their_kind():
    for number in range(FIRST, FIRST + COUNT):
        kind, p, point = randoms.drawn(number)
        assert kind == randoms.KINDS[number % 6]
        assert randoms.drawn(number)[1] == p
        if kind in randoms.BELOW:
            assert p.at([point[int(v[1:]) - 1] for v in p.variables]) == -1
        if kind in randoms.SUMS:
            assert min(p.at([Fraction(k * i - 3, 2) for i in range(len(p.variables))]) for k in range(5)) >= 0


@pytest.mark.parametrize("places", [0, 6])
def test_inside_is_strictly_feasible(places):
    """Its value is the squared length of (G', I) D z, which is |Gz|^2 + |z|^2 where D is the unit matrix."""
    terms = randoms.inside(2, 2, places, generator(7))
    assert len(terms) == 15 and all(isinstance(c, int) for c in terms.values())
    rng = generator(7)
    factor, scale = rng.integers(-5, 6, (6, 6)), 10 ** rng.integers(0, places + 1, 6)
    x, y = 3, -2
    z = np.array([x * x, x * y, y * y, x, y, 1])
    order = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]
    values = dict(zip(order, z.tolist(), strict=True))
    z = np.array([values[m] for m in gram.up_to(2, 2)]) * scale
    said = sum(c * x**a * y**b for (a, b), c in terms.items())
    assert said == int(((factor.T @ z) ** 2).sum() + (z**2).sum())


def test_mistakes_are_noticed():
    """Each kind of mistake is put into a good certificate."""
    p = randoms.polynomial("x^4 + x^2*y^2 + y^4 + 1")
    good = SumOfSquares().certify(p, Context())
    negative = SumOfSquares().certify("x^4 - 5*x^2 + 1", Context())
    assert randoms.mistake("inside", p, good) == "" and randoms.mistake("random", negative_p := randoms.polynomial(
        "x^4 - 5*x^2 + 1"), negative) == ""  # fmt: skip
    assert randoms.mistake("inside", p, dataclasses.replace(good, squares=good.squares[1:])).startswith("refused")
    assert randoms.mistake("inside", negative_p, good) == "it is about another polynomial"
    assert randoms.mistake("planted", negative_p, negative) == "a sum of squares is called none"
    assert randoms.mistake("below", p, good) == "a polynomial that is negative somewhere is called nonnegative"
    unproven = dataclasses.replace(good, status="numeric", squares=())
    assert randoms.mistake("inside", p, unproven) == "strictly feasible, but not proven"
    assert randoms.mistake("planted", p, unproven) == ""
