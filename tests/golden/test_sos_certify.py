"""sos.certify on polynomials whose truth is known, with decompositions and separations written by hand."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.flows import Certificate
from luthier.kit import gram, moments, proof
from luthier.kit.attempts import GRIDS
from luthier.kit.context import Context
from luthier.kit.planted import Planting, generator, plant
from luthier.kit.polynomial import polynomial
from luthier.kit.problem import Problem
from luthier.sos.certify import SumOfSquares

MOTZKIN = "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1"
ROBINSON = "x^6 + y^6 + z^6 - x^4*y^2 - x^2*y^4 - x^4*z^2 - y^4*z^2 - x^2*z^4 - y^2*z^4 + 3*x^2*y^2*z^2"
CHOI_LAM = "x^2*y^2 + x^2*z^2 + y^2*z^2 + w^4 - 4*x*y*z*w"
SCHEIDERER = "x^4 + x*y^3 + y^4 - 3x^2*y*z - 4x*y^2*z + 2x^2*z^2 + x*z^3 + y*z^3 + z^4"
SCHMUEDGEN = (
    "199x^6 - x^4*y^2 + 2x^2*y^4 + 200y^6 - 4x^3*y^2*z + 4x*y^4*z - 1588x^4*z^2 - 12x^2*y^2*z^2"
    " - 1600y^4*z^2 + 16x^3*z^3 - 16x*y^2*z^3 + 3200x^2*z^4 + 3200y^2*z^4"
)
LAX_LAX = " + ".join(
    "*".join(f"(x{i} - x{j})" for j in range(5) if j != i) if i < 4 else "x0*x1*x2*x3" for i in range(5)
).replace(" - x4", "")
HORN = "(v^2+w^2+x^2+y^2+z^2)^2 - 4*(v^2*w^2 + w^2*x^2 + x^2*y^2 + y^2*z^2 + z^2*v^2)"
NORM = "(v^2+w^2+x^2+y^2+z^2)"


def certify(problem, multipliers=0, **fields):
    """By default: is it a sum of squares itself?"""
    return SumOfSquares(multipliers=multipliers, **fields).certify(problem, Context())


def hand(problem, squares, **more):
    """A certificate with squares given as {weight: text}."""
    p = polynomial(problem)

    def plain(text):
        q = polynomial(text)
        place = [p.variables.index(v) for v in q.variables]
        rows = []
        for exponents, c in q.terms:
            wide = [0] * len(p.variables)
            for i, e in zip(place, exponents, strict=True):
                wide[i] = e
            rows.append((tuple(wide), str(c)))
        return tuple(rows)

    made = tuple((str(weight), plain(text)) for weight, text in squares)
    return Certificate("exact", "by hand", p.variables, plain(problem), made, **more)


@pytest.mark.parametrize(
    ("problem", "squares"),
    [
        ("2x^4 + 2x^3*y - x^2*y^2 + 5y^4", [("1/2", "2x^2 - 3y^2 + x*y"), ("1/2", "y^2 + 3x*y")]),
        ("4x^4 + 12x^2*y^2 + 9y^4 + 1", [(1, "2x^2 + 3y^2"), (1, "1")]),
        ("x^4 - 3x^2 + 9/4", [(1, "x^2 - 3/2")]),
        ("2x^2 + 2x*y + 5y^2 + 1/3", [(2, "x + y/2"), ("9/2", "y"), ("1/3", "1")]),
        ("x^6 - 2x^3 + 1", [(1, "x^3 - 1")]),
        (f"(x^2 + y^2)^2 * ({MOTZKIN})", [
            (1, "x^2*y*(x^2 + y^2 - 2)"), (1, "x*y^2*(x^2 + y^2 - 2)"), (1, "x*y*(x^2 + y^2 - 2)"), (1, "x^2 - y^2"),
        ]),
        ("4/9*x^2 - 4/3*x*y + y^2 + 0.01", [(1, "2x/3 - y"), ("1/100", "1")]),
    ],
)  # fmt: skip
def test_sums_with_a_decomposition_by_hand(problem, squares):
    by_hand = hand(problem, squares)
    assert by_hand.refusal() is None
    found = certify(problem)
    assert found.status == "exact", found
    assert found.refusal() is None
    assert set(found.polynomial) == set(by_hand.polynomial)


def test_squares_that_are_forced():
    """Of a quadratic there is one Gram matrix, so the squares are known to the number."""
    found = certify("2x^2 + 2x*y + 5y^2 + 1/3")
    assert found.squares == hand("2x^2 + 2x*y + 5y^2 + 1/3", [(2, "x + y/2"), ("9/2", "y"), ("1/3", "1")]).squares
    assert found.reason == "a sum of 3 squares over 3 of 3 monomials"
    assert found.basis == ((1, 0), (0, 1), (0, 0))
    assert found.numbers == {"all": 3, "basis": 3, "blocks": 2, "block": 2, "products": 4, "bits": 0, "faces": 0} | {
        k: found.numbers[k] for k in ("margin", "residual")
    }
    assert found.numbers["margin"] == 0.0625  # the least eigenvalue 1/3 in units of 16/3, which holds the 15/3


@pytest.mark.parametrize("basis", ["consistent", "newton", "full"])
@pytest.mark.parametrize("problem", [MOTZKIN, ROBINSON, CHOI_LAM], ids=["motzkin", "robinson", "choi-lam"])
def test_nonnegative_but_no_sum_of_squares(problem, basis):
    found = certify(problem, basis=basis)
    assert (found.status, found.point, found.refusal()) == ("not_sos", (), None)
    assert found.functional


def test_motzkin_needs_the_one_monomial():
    """Only 1, xy, x^2 y, x y^2 may occur, x^2 y^2 comes from (xy)^2 alone, and its coefficient is negative."""
    found = certify(MOTZKIN)
    assert found.basis == ((2, 1), (1, 2), (1, 1), (0, 0))
    by_hand = dataclasses.replace(found, functional=(((2, 2), "1"),))
    assert by_hand.refusal() is None
    assert found.numbers["margin"] == -0.75  # -3 in units of 4
    assert [line.split(":")[0] for line in found.tried] == ["Clarabel"]


@pytest.mark.parametrize(("c", "status"), [(0, "exact"), ("1/1000", "not_sos"), (-1, "exact"), (3, "not_sos")])
def test_motzkins_family(c, status):
    """x^4 y^2 + x^2 y^4 + 1 - c x^2 y^2 is a sum of squares for c <= 0 only, by the same argument."""
    found = certify(f"x^4*y^2 + x^2*y^4 + 1 - ({c})*x^2*y^2")
    assert (found.status, found.refusal()) == (status, None)


def test_products_that_are_sums_of_squares():
    for problem in (f"(x^2 + y^2)*({MOTZKIN})", f"(1 + x^2 + y^2)*({MOTZKIN})", f"({HORN})*{NORM}"):
        assert certify(problem).refusal() is None, problem
    assert certify(HORN).status == "not_sos"


@pytest.mark.parametrize(
    "problem", [MOTZKIN, ROBINSON, CHOI_LAM, HORN], ids=["motzkin", "robinson", "choi-lam", "horn"]
)
def test_nonnegative_by_a_multiplier(problem):
    """At the defaults: p times 1 + |x|^2, or |x|^2 for a form, is a sum of squares; p itself is shown to be none."""
    found = certify(problem, multipliers=2)
    assert (found.status, found.refusal(), found.numbers["multiplier"]) == ("exact", None, 1)
    assert found.functional and dataclasses.replace(found, status="not_sos").refusal() is None
    assert dataclasses.replace(found, multiplier=()).refusal()


def test_schmuedgen_and_lax_lax():
    for problem in (SCHMUEDGEN, LAX_LAX):
        assert (certify(problem).status, certify(problem).refusal()) == ("not_sos", None)


def test_scheiderer_has_no_rational_proof():
    """A sum of squares of real polynomials, of no rational ones (Scheiderer 2016): no proof must be claimed."""
    found = certify(SCHEIDERER)
    assert (found.status, found.squares, found.verify()) == ("numeric", (), False)
    assert [line.split(":")[0] for line in found.tried[:3]] == [
        "Clarabel", "rounding to multiples of 1 to 2^-40", "a functional that separates it from the squares",
    ]  # fmt: skip
    assert abs(found.numbers["margin"]) < 1e-6 and found.numbers["residual"] < 1e-6
    assert found.reason.startswith("a sum of squares to ") and found.reason.endswith("may need irrational numbers")
    assert len(found.basis) == 6


def test_the_exact_bound():
    """-729/4096 is a known rational bound of x^4 + x^2 + z^6 - 3 x^2 z^2, close above the least one."""
    form = "x^4 + x^2 + z^6 - 3*x^2*z^2"
    assert certify(f"{form} + 729/4096").status == "exact"
    assert certify(f"{form} + 0.1779").status == "not_sos"


def test_inside_and_boundary():
    """Margins of x^4 + a x^2 + b by hand: the Gram matrices are [[1, s], [s, b]] and a - 2s."""
    assert certify("x^4 + x^2/4 + 1/2").numbers["margin"] > 0.1
    edge = certify("x^4 - 2x^2 + 1")
    assert edge.status == "exact" and abs(edge.numbers["margin"]) < 1e-6
    assert len(edge.squares) == 1


def test_where_constraints_hold():
    """(1 - x)(1 - y) + 1/10 on the square has no sum of degree 2, but one of degree 4."""
    asked = {"polynomial": "(1 - x)*(1 - y) + 1/10", "nonneg": ["1 - x^2", "1 - y^2"]}
    for fields, degree in (({}, 4), ({"degree": 4}, 4), ({"degree": 2}, None), ({"steps": 0}, None)):
        made = certify(asked, **fields)
        assert (made.status, made.numbers["degree"]) == (("exact", degree) if degree else ("unknown", 2))
        assert made.verify() == bool(degree)
    with pytest.raises(LuthierError, match="the degree 3 is odd"):
        SumOfSquares(degree=3)


def test_bounds_where_constraints_hold():
    """The largest bound of degree 2 on the square is -1/2; with one step or at degree 4 it is some -0.0112."""
    asked = {"polynomial": "(1 - x)*(1 - y)", "nonneg": ["1 - x^2", "1 - y^2"]}
    found = {d: float(Fraction(certify(asked, ask="bound", degree=d).bound)) for d in (2, 4)}
    assert found == {2: pytest.approx(-0.5, abs=1e-6), 4: pytest.approx(-0.0112373, abs=1e-6)}
    assert float(Fraction(certify(asked, ask="bound", steps=1).bound)) == pytest.approx(found[4], abs=1e-6)
    assert Fraction(certify({"polynomial": "x*y", "nonneg": "1 - x^2 - y^2"}, ask="bound").bound) == Fraction(-1, 2)
    assert certify("x^2 + 2*x", ask="bound").bound == "-1"
    form = certify("x^2 - 2*x*y + 2*y^2", ask="bound")  # its minimum is 0 or none
    assert (form.status, form.bound, len(form.squares)) == ("exact", "0", 2)


@pytest.mark.parametrize(
    ("problem", "where"),
    [("x^2 - 4x*y + y^2", (1, 1)), ("x^3 + y^2", (-1, 0)), ("x^2 + x", ("-1/2",)), ("-x^4", (1,)), ("x*y", (1, -1))],
)
def test_a_point_says_most(problem, where):
    found = certify(problem)
    assert found.status == "not_sos"
    assert found.point == tuple(map(str, where)) and not found.functional
    assert found.reason == "it is negative at " + ", ".join(
        f"{v} = {x}" for v, x in zip(found.variables, where, strict=True)
    )
    assert found.refusal() is None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_margin_is_a_margin(sign):
    """2^-15 = 3e-5 says clearly on which side it lies: the other side is not even tried."""
    found = certify(f"(x + 1/2)^2 + {sign}/2^15".replace("+ -", "- "))
    least = np.linalg.eigvalsh(np.array([[1, 0.5], [0.5, 0.25 + sign / 2**15]]))[0]
    assert found.numbers["margin"] == pytest.approx(least, rel=1e-2)
    assert (found.status, len(found.tried)) == ("exact" if sign > 0 else "not_sos", 1)


def test_a_monomial_that_no_squares_give():
    found = certify(CHOI_LAM)
    assert found.reason == "w*x*y*z is no product of two monomials that its squares may hold"
    assert found.functional == (((1, 1, 1, 1), "4"),)
    assert found.numbers == {"all": 15, "basis": 4}
    other = certify("1000x^4 + x^2*y^3 + 1000*y^2 + 1000")
    assert (other.status, other.refusal(), other.reason[:7]) == ("not_sos", None, "x^2*y^3")
    assert other.functional == (((2, 3), "-1"),)


def test_constants_and_zero():
    assert certify(7).squares == (("7", (((), "1"),)),)
    assert certify("x - x").reason == "the zero polynomial is the sum of no squares"
    assert certify("0").verify()
    assert (certify(-7).status, certify(-7).functional) == ("not_sos", (((), certify(-7).functional[0][1]),))


def test_defaults_are_these():
    plain = {
        "ask": "nonnegative", "basis": "consistent", "multipliers": 2, "degree": None, "steps": 2, "products": False,
        "first": "sdsos", "rules": True, "chordal": False, "symmetry": True, "faces": True,
        "bits": 40, "tolerance": 1e-8, "largest": 100, "seconds": None,
    }  # fmt: skip
    assert SumOfSquares().to_dict()["set"] == plain
    assert GRIDS == (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 32)


def test_bases():
    """Sizes by hand: 6 monomials of degree up to 2; in half the polytope of x^4 y^2, x^2 y^4 and 1 lie four."""
    assert [certify(MOTZKIN, basis=b).numbers["basis"] for b in ("full", "newton", "consistent")] == [10, 4, 4]
    assert certify(MOTZKIN, basis="full").numbers["all"] == 10
    # half the polytope of x^4, y^4, 1 with x y: xy stays, since x^2 y^2 = x^2 * y^2
    assert certify("x^4 + y^4 + 1 + x*y", basis="newton").numbers["basis"] == 6
    # x^2 lies in half the polytope of 1 and x^8 y^2 + ..., but nothing there doubles to it
    thin = "x^6 + 1 + 100*x^2*y^2 + y^2"
    sizes = [certify(thin, basis=b).numbers["basis"] for b in ("full", "newton", "consistent")]
    assert sizes == sorted(sizes, reverse=True)


def test_too_large_is_said():
    found = certify("x^4 + y^4 + x*y + y + 2", largest=5, rules=False)
    says = "a block of 6 monomials (about 0.0 GiB), largest=5 are allowed"
    assert (found.status, found.reason) == ("unknown", says)
    assert certify("x^4 + y^4 + x*y + y + 2", largest=6, rules=False).status == "exact"
    assert certify("x^4 + y^4 + x*y + y + 2", largest=5).reason == "a sum of 5 squares over 5 of 6 monomials"
    assert certify("x^4 + y^4 + x*y + y - 9", largest=5).point == ("0", "0")
    blocks = certify("x^4 + y^4 + 1", largest=3)  # x^2, y^2, 1 and three alone
    assert (blocks.status, blocks.numbers["blocks"], blocks.numbers["block"]) == ("exact", 4, 3)
    wide = "(1 + x + y + z + w)^4 + (x*y*z*w)^4"
    large = certify(dict(polynomial(wide).terms), basis="full", rules=False)  # its text shows squares
    assert large.numbers == {"all": 495, "basis": 495, "blocks": 1, "block": 495}  # nothing is made of a basis so large
    assert "block of 495 monomials (about 701.8 GiB)" in large.reason
    many = "(" + " + ".join(f"x{i}^5" for i in range(24)) + ")^2 + 1"
    terms = dict(polynomial(many).terms)
    assert certify(terms, rules=False).reason == "more than 5000 monomials to choose a basis from"
    assert certify(terms, basis="full", rules=False).status == "unknown"
    assert certify(many, rules=False).reason == "the 2 squares as they are written"
    assert len(certify(terms).basis) == 25  # the corners: 1 and the fifth powers
    assert certify(f"{many} - 2").status == "not_sos"


WIDE = (
    "2 + 3*(a^6 + b^6 + c^6 + d^6 + a^2*b^2*c^2 + b^2*c^2*d^2) + (a^3 - 2*b*c)^2 + (a*b*c + 3*d)^2 + a^4 + b^4 + c^4"
    " + d^4 + a^2*b^2 + 2*c^2*d^2 + a^2 + b^2 + c^2 + d^2 + a*b/2 - c*d/3 + a/4 - b/5 + c/6 + d/7 + a*b*c/8 + a^2*d/9"
    " + a^3*d^3/10 + b^3*c^3/11 + a^5*b/12 + a^4*b^2 + b^4*c^2 + c^4*d^2 + d^4*a^2 + a^4*d^2 + b^4*d^2 + c^4*a^2"
    " + a^4*c^2 + b^4*a^2 + c^4*b^2 + d^4*b^2 + d^4*c^2 + a^2*b^2*d^2 + a^2*c^2*d^2 + a^2*c^2 + a^2*d^2 + b^2*c^2"
    " + b^2*d^2"
)


def test_squares_of_two_are_tried_first():
    """All 35 monomials in one block: by pairs at once, also where it is too large for the other program."""
    terms = dict(polynomial(WIDE).terms)
    first, small = certify(terms), certify(terms, largest=30)
    assert first.status == small.status == "exact" and first.numbers["block"] == 35
    assert first.tried[0].startswith("Clarabel, sdsos") and len(first.tried) == 1
    plain = certify(terms, first="none")
    assert plain.status == "exact" and plain.tried[0].startswith("Clarabel: ")
    assert certify(terms, first="none", largest=30).status == "unknown"
    dominant = certify(terms, first="dsos")
    assert dominant.tried[0].startswith("Clarabel, dsos") and dominant.status == "exact"
    more = {m: c for m, c in polynomial(f"(a + b + c + d + 1)^4 + ({WIDE})/1000").terms}  # no squares of two monomials
    whole = certify(more)
    assert [line.split(":")[0] for line in whole.tried[:2]] == ["Clarabel, sdsos", "Clarabel"]
    assert whole.status == "exact" == certify(more, first="none").status


def test_fewer_monomials_where_all_leave_no_room():
    """Planted of low rank: over all 20 monomials nothing is rounded, over the guessed ones it is."""
    planting = Planting(n=3, half=3, size=8, matrix="lowrank", coercive=True)
    several = [plant(planting, generator(5, k)).polynomial for k in range(12)]
    plain = [certify(p, rules=False) for p in several]
    with_rules = [certify(p) for p in several]
    helped = [(a, b) for a, b in zip(plain, with_rules, strict=True) if (a.status, b.status) == ("numeric", "exact")]
    assert helped and all(b.verify() and len(b.basis) < len(a.basis) for a, b in helped)
    assert all(b.tried[: len(a.tried)] == a.tried for a, b in helped)  # what was tried before stays
    assert all(b.status == a.status for a, b in zip(plain, with_rules, strict=True) if a.status != "numeric")


def test_guesses_refute_nothing(monkeypatch):
    """Too many monomials for a basis: the corners of Newton's polytope are asked, and say no more than yes."""
    monkeypatch.setattr("luthier.kit.lattice.basis", lambda p, how: None)
    assert certify("x^4 + y^4 + x^2*y^2/3 + 1").status == "exact"
    motzkin = certify({(4, 2): 1, (2, 4): 1, (2, 2): -3, (0, 0): 1})
    assert motzkin.status == "unknown" and motzkin.tried[0].startswith("over 4 monomials: neither")
    assert len(certify({(4, 2): 1, (2, 4): 1, (2, 2): -3, (0, 0): 1}, rules=False).tried) == 0


def test_a_point_that_is_found_over_fewer_monomials_counts(monkeypatch):
    """Where floats said yes over all of them, and were wrong by less than they see."""

    def over(p, basis, settings, ctx, complete):
        if complete:
            return proof.given(Problem(p), "numeric", "as far as floats see", basis=basis, numbers={})
        return proof.negative(Problem(p), {})

    monkeypatch.setattr(proof, "over", over)
    found = certify({(6, 0): 1, (0, 6): 1, (3, 0): -4, (0, 0): 1})
    assert found.status == "not_sos" and found.point and found.verify()
    assert certify({(6, 0): 1, (0, 6): 1, (3, 0): -4, (0, 0): 1}, rules=False).status == "numeric"


def test_the_grid_of_the_rounding():
    """With whole numbers alone x^4 + x^2/4 + 1/2 cannot be rounded; some finer grid serves."""
    problem = "7x^4 + 5x^3*y - x^2*y^2 + 3x*y^3 + 4y^4 + x^2/3 + y^2/7 + 1/9"
    coarse, fine = certify(problem, bits=0), certify(problem)
    assert coarse.status == "numeric"
    assert "rounding to multiples of 1 to 2^-0: never positive semidefinite" in coarse.tried
    assert fine.status == "exact" and 0 < fine.numbers["bits"] < 20
    assert certify(problem, bits=int(fine.numbers["bits"])).numbers["bits"] == fine.numbers["bits"]


def test_scale_changes_nothing():
    """A factor of the polynomial is a factor of the weights."""
    plain, large = certify("2x^4 + 2x^3*y - x^2*y^2 + 5y^4"), certify("2^40*(2x^4 + 2x^3*y - x^2*y^2 + 5y^4)")
    assert [(Fraction(w) * 2**40, t) for w, t in plain.squares] == [(Fraction(w), t) for w, t in large.squares]
    assert certify("x^2/1e300 + 1e300").status == "exact"


def test_what_is_not_found_is_unknown():
    """A grid too coarse to separate, a solver too loose to say `numeric`, a margin too large to doubt its sign."""
    coarse = certify(ROBINSON, bits=0)
    assert (coarse.status, coarse.reason) == ("unknown", "neither squares nor a proof against them")
    assert [line.split(":")[0] for line in coarse.tried[1:]] == ["a functional that separates it from the squares"]
    loose = certify(SCHEIDERER, tolerance=1e-2)
    assert loose.status == "unknown" and loose.numbers["residual"] > 1e-6
    inside = certify("x^4 + x^2 + z^6 - 3*x^2*z^2 + 0.178", bits=0, rules=False)
    assert inside.status == "numeric" and 1e-6 < inside.numbers["margin"] < 2e-6
    assert [line.split(":")[0] for line in inside.tried[1:]] == ["rounding to multiples of 1 to 2^-0"]


def test_a_failed_solve_is_a_result():
    found = certify(ROBINSON, seconds=1e-9)
    assert found.status in ("unknown", "numeric", "not_sos")
    if found.status == "unknown":
        assert "MaxTime" in found.tried[0]


def test_numbers_that_are_none_are_no_proof(monkeypatch):
    """Where the solver breaks down, or the verifier disagrees, nothing is claimed."""
    real = moments.solve

    def broken(*args, fold):
        found = real(*args, fold=fold)
        found.grams[0][0, 0] = math.nan
        return found

    monkeypatch.setattr(moments, "solve", broken)
    found = certify({(2,): 1, (0,): 1})
    assert (found.status, found.tried[-1]) == ("unknown", "the solver gave no numbers")
    assert certify("x^2 + 1").reason == "the 2 squares as they are written"  # which need no solver
    monkeypatch.undo()
    monkeypatch.setattr(gram, "consistent", lambda p, candidates: gram.full(p)[1:])  # loses x^2: a wrong basis
    found = certify({(4, 0): 1, (0, 4): 1, (0, 0): 1})
    assert found.status == "unknown" and "the verifier refuses the proof: the basis lacks" in found.reason


def test_a_certificate_is_data(tmp_path):
    for problem in ("x^2 + 1", MOTZKIN, SCHEIDERER):
        found = certify(problem)
        path = tmp_path / "c.json"
        path.write_text(found.to_json())
        again = Certificate.from_json(path.read_text())
        assert (again, again.refusal()) == (found, found.refusal())
        assert set(json.loads(path.read_text())) == {f.name for f in dataclasses.fields(Certificate)}


def test_it_reads_well():
    said = str(certify("2x^4 + 2x^3*y - x^2*y^2 + 5y^4"))
    head, left, right = said.split("\n")
    assert head == "exact: a sum of 3 squares over 3 of 6 monomials" and polynomial(left) == polynomial(right[2:])
    p = polynomial(right[2:])
    assert p == polynomial("2x^4 + 2x^3*y - x^2*y^2 + 5y^4")


COEFFICIENTS = st.sampled_from([Fraction(n, d) for n in range(-3, 4) for d in (1, 2, 3)])
LINES = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 2)), COEFFICIENTS, min_size=1, max_size=4)


@given(st.lists(LINES, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_what_is_planted_is_never_refuted(lines, weight):
    """Sums of squares get a proof or an honest `numeric`; less their value somewhere, and 1, a refutation."""
    total = " + ".join(f"{weight}*({polynomial(line)})^2" for line in lines)
    found = certify(total)
    assert found.status in ("exact", "numeric"), total
    assert found.status == "numeric" or found.verify()
    p = polynomial(total)
    below = certify(f"{total} - {p.at([1] * len(p.variables)) + 1}")
    assert below.status == "not_sos" and below.verify()


def test_strictly_inside_is_always_proven():
    """b'(GG' + I)b over all of b has a positive definite Gram matrix, so there must be a proof."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        basis = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]
        factor = rng.integers(-9, 10, (6, 6))
        matrix = factor @ factor.T + 3 * np.eye(6, dtype=int)
        terms = {}
        for i, a in enumerate(basis):
            for j, b in enumerate(basis):
                key = (a[0] + b[0], a[1] + b[1])
                terms[key] = terms.get(key, 0) + Fraction(int(matrix[i, j]), 7)
        for way in ("consistent", "newton", "full"):
            assert certify(terms, basis=way).status == "exact"
