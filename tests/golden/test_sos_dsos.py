"""sos.dsos against margins worked out by hand: 3x3 Gram matrices with one free number, and forced ones."""

import dataclasses
import math

import numpy as np
import pytest

from luthier.kit import diagonal, pairs
from luthier.kit.cones import Program, cone
from luthier.kit.context import Context
from luthier.kit.polynomial import polynomial
from luthier.sos.dsos import Diagonal

MOTZKIN = "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1"
ROBINSON = "x^6 + y^6 + z^6 - x^4*y^2 - x^2*y^4 - x^4*z^2 - y^4*z^2 - x^2*z^4 - y^2*z^4 + 3*x^2*y^2*z^2"


def certify(problem, **fields):
    return Diagonal(**fields).certify(problem, Context())


def dominance(matrix):
    """The largest t so that matrix - tI is diagonally dominant: what a row's diagonal has over the rest of the row."""
    off = np.abs(matrix).sum(axis=1) - np.abs(matrix.diagonal())
    return (matrix.diagonal() - off).min()


def scaled(matrix):
    """The same for scaled diagonal dominance: the least eigenvalue once every entry off the diagonal is negative."""
    turned = -np.abs(matrix)
    np.fill_diagonal(turned, matrix.diagonal())
    return np.linalg.eigvalsh(turned)[0]


def best(quartic, margin):
    """Over all Gram matrices of a x^4 + b x^3 y + c x^2 y^2 + d x y^3 + e y^4; it is concave in the free number."""
    a, b, c, d, e = quartic

    def at(s):
        return margin(np.array([[a, b / 2, s], [b / 2, c - 2 * s, d / 2], [s, d / 2, e]]))

    low, high = -10.0, 10.0
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if at(left) < at(right) else (low, right)
    return at((low + high) / 2)


def margins(p, kind):
    """What the program finds over one block, for a polynomial whose coefficients are taken as they are."""
    p = polynomial(p)
    basis = [m for m in ((2, 0), (1, 1), (0, 2))] if p.degree == 4 else [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    return diagonal.solve(Program((cone(basis),)), {m: float(c) for m, c in p.terms}, kind, 1e-10, None)


@pytest.mark.parametrize(
    "quartic",
    [(1, 0, 1, 0, 1), (1, 1, 3, -1, 2), (1, -3, 4, 1, 1), (2, 2, -1, 0, 5), (1, 4, 6, 4, 1), (3, 1, -4, 2, 2)],
)
def test_margins_of_quartics_in_two_variables(quartic):
    a, b, c, d, e = quartic
    text = f"{a}*x^4 + ({b})*x^3*y + ({c})*x^2*y^2 + ({d})*x*y^3 + {e}*y^4"
    inner, outer = margins(text, "dsos"), margins(text, "sdsos")
    assert inner.optimum == pytest.approx(best(quartic, dominance), abs=1e-6)
    assert outer.optimum == pytest.approx(best(quartic, scaled), abs=1e-6)
    for found, margin in ((inner, dominance), (outer, scaled)):
        assert found.residual < 1e-7
        (gram,) = found.grams
        assert margin(gram) == pytest.approx(found.optimum, abs=1e-6)  # the Gram matrix itself has this margin
        assert gram[0, 0] == pytest.approx(a) and 2 * gram[0, 1] == pytest.approx(b) and gram[2, 2] == pytest.approx(e)
        assert sum(float(v) * found.moments[m] for m, v in polynomial(text).terms) == pytest.approx(found.optimum)


def test_sdsos_but_not_dsos():
    """x^2 + 4xy + 5y^2 has one Gram matrix, [[1, 2], [2, 5]]: 1 < 2, but positive definite, and of size 2."""
    text = "x^2 + 4*x*y + 5*y^2"
    assert certify(text).squares == (("1", (((1, 0), "1"), ((0, 1), "2"))), ("1", (((0, 1), "1"),)))
    missed = certify(text, cone="dsos")
    assert (missed.status, missed.squares, missed.verify()) == ("unknown", (), False)
    assert missed.numbers["margin"] == -0.125  # 1 - 2 in units of 8
    assert certify(text).numbers["margin"] == pytest.approx((3 - math.sqrt(8)) / 8, rel=1e-2)


@pytest.mark.parametrize(
    ("more", "status"), [("1/2", "unknown"), ("99/100", "unknown"), ("101/100", "exact"), (2, "exact")]
)
@pytest.mark.parametrize("kind", ["dsos", "sdsos"])
def test_sums_of_squares_that_are_neither(more, status, kind):
    """(x + y + z)^2 + e (x^2 + y^2 + z^2): the one Gram matrix J + eI is dominant, scaled or not, from e = 1 on."""
    text = f"(x + y + z)^2 + {more}*(x^2 + y^2 + z^2)"
    found = certify(text, cone=kind)
    assert (found.status, found.verify()) == (status, status == "exact")
    assert margins(text, kind).optimum == pytest.approx(float(eval(str(more))) - 1, abs=1e-7)


def test_scaling_the_variables_changes_dsos_alone():
    plain, stretched = "x^4 + x^3*y + 4*x^2*y^2 + y^4", "10000*x^4 + 1000*x^3*y + 400*x^2*y^2 + y^4"  # x -> 10 x
    assert [certify(plain, cone=c).status for c in ("dsos", "sdsos")] == ["exact", "exact"]
    far = "10000*x^2 + 100*x*y + y^2 - 1/4*y^2"  # (x + y/2)^2 + y^2/2 with x -> 100 x
    assert [certify(far, cone=c).status for c in ("dsos", "sdsos")] == ["unknown", "exact"]
    assert certify(stretched).status == "exact"


def test_what_is_refuted_is_proven():
    """The functional of Motzkin's polynomial is 1 at x^2 y^2 alone, so it is nonnegative on all squares; that of
    Robinson's is not looked for in the right cone, and nothing is said."""
    found = certify(MOTZKIN)
    assert (found.status, found.point, found.refusal()) == ("not_sos", (), None) and found.functional
    assert certify(ROBINSON).status == "unknown"
    assert certify("x^2 - 4*x*y + y^2").point == ("1", "1")
    lonely = certify("x^2*y^2 + x^2*z^2 + y^2*z^2 + w^4 - 4*x*y*z*w")
    assert (lonely.status, lonely.reason[:7]) == ("not_sos", "w*x*y*z")
    neither = certify("(x + y + z)^2", cone="dsos")  # a square, which the dual of the smaller cone must not refute
    assert neither.status == "unknown" and "negative on a square of more than two" in neither.tried[1]


def test_the_spread_functional():
    """Means of cos(u)^k by hand: 1/2 of squares, 3/8 of fourth powers, 0 of odd ones; the matrix is positive."""
    program = Program((cone([(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]),))
    found = diagonal.spread(program)
    trace = 3 / 8 + 1 / 4 + 3 / 8 + 1 / 2 + 1 / 2 + 1
    assert found[(4, 0)] == pytest.approx(3 / 8 / trace) and found[(2, 2)] == pytest.approx(1 / 4 / trace)
    assert found[(0, 0)] == pytest.approx(1 / trace) and found[(3, 1)] == 0
    matrix = np.array([[found[(a[0] + b[0], a[1] + b[1])] for b in ((2, 0), (0, 2), (0, 0))] for a in
                       ((2, 0), (0, 2), (0, 0))])  # fmt: skip
    assert np.linalg.eigvalsh(matrix)[0] > 0


def test_limits_and_defaults():
    plain = {"cone": "sdsos", "basis": "consistent", "bits": 40, "tolerance": 1e-8, "largest": 300, "seconds": None}
    assert Diagonal().to_dict()["set"] == plain
    small = certify("x^4 + y^4 + 1", largest=5)
    assert (small.status, small.reason) == ("unknown", "a basis of 6 monomials, largest=5 are allowed")
    assert certify("x^4 + y^4 + 1", largest=6).reason == "a sum of 6 squares over 6 of 6 monomials"
    assert [certify(MOTZKIN, basis=b).numbers["basis"] for b in ("full", "newton", "consistent")] == [10, 4, 4]
    held = certify({"polynomial": "x", "nonneg": ["x"]})
    assert (held.status, held.tried) == ("unknown", ("nothing: constraints are not looked at",))
    assert certify("x - x").verify()
    text = "x^4 - 1.9*x^2*y^2 + y^4"  # the free entry lies between -1 and -0.95
    coarse, fine = certify(text, bits=0), certify(text)
    assert coarse.status == "unknown"
    assert coarse.tried[1] == "rounding to multiples of 1 to 2^-0: never positive semidefinite"
    assert fine.status == "exact" and fine.numbers["bits"] > 0


def test_on_the_boundary():
    """(x^2 - 1)^2 and (x - 1)^2 + (y - 2)^2 have margin 0: whole numbers meet it."""
    for text, count in (("x^4 - 2*x^2 + 1", 1), ("x^2 + y^2 - 2*x - 4*y + 5", 2)):
        found = certify(text)
        assert (found.status, len(found.squares)) == ("exact", count)
        assert abs(found.numbers["margin"]) < 1e-6
    below = certify("x^4 - 2*x^2 + 1 - 1/1000")  # negative at 1, and by a clear margin
    assert (below.status, below.refusal()) == ("not_sos", None)


def test_a_failed_solve_is_a_result(monkeypatch):
    stopped = certify(ROBINSON, seconds=1e-9)
    assert stopped.status == "unknown" and "MaxTime" in stopped.tried[0]
    real = diagonal.solve

    def broken(*args):
        found = real(*args)
        found.grams[0][0, 0] = math.nan
        return found

    monkeypatch.setattr(diagonal, "solve", broken)
    lost = certify("x^4 + x^2 + y^2 + 1 + x*y")
    assert (lost.status, lost.reason) == ("unknown", "the solver gave no numbers")


def test_a_large_basis():
    """84 monomials: a sum of binomial squares and all squares, whose semidefinite program takes ten seconds or more."""
    every = " + ".join(f"(x{i}^3 - x{j}^2*x{i})^2" for i in range(6) for j in range(6) if i != j)
    found = certify(f"{every} + (1 + x0^2 + x1^2 + x2^2 + x3^2 + x4^2 + x5^2)^3")
    assert (found.status, found.numbers["basis"]) == ("exact", 84)
    assert found.verify()


def test_a_functional_is_looked_for_below_the_boundary_only(monkeypatch):
    """At margin 0 nothing separates; the program's functional is not asked then."""
    real = pairs.solved

    def unrounded(*args):
        made, found = real(*args)
        made.squares = None
        return made, dataclasses.replace(found, optimum=0.0)

    monkeypatch.setattr(pairs, "solved", unrounded)
    found = certify("x^4 + x^2 + 1")
    assert found.status == "unknown" and len(found.tried) == 1 + any("rounding" in line for line in found.tried)
