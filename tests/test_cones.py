"""How a sum of squares falls into blocks, faces and units, and what is found over constraints: by hand and by twins."""

import dataclasses
import itertools
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.kit import attempts, balance, cones, descent, faces, gram, minimisers, moments, orbits, proof
from luthier.kit.context import Context
from luthier.kit.polynomial import polynomial
from luthier.kit.problem import problem
from luthier.sos.certify import SumOfSquares

GOLDSTEIN_PRICE = "(1 + (x+y+1)^2*(19-14x+3x^2-14y+6x*y+3y^2)) * (30 + (2x-3y)^2*(18-32x+12x^2+48y-36x*y+27y^2))"


def certify(asked, **fields):
    return SumOfSquares(**fields).certify(asked, Context())


def whole(p):
    return cones.Program((cones.cone(gram.consistent(p, gram.box(p))),))


def blocks(text, chordal=False):
    p = polynomial(text)
    return sorted(sorted(c.monomials) for c in cones.split(whole(p), p.support, chordal).cones)


def test_blocks_by_hand():
    """Signs of x and of y may change: x^2, y^2 and 1 go together. A term x y ties x to y, and xy to the squares."""
    assert blocks("x^4 + y^4 + 1") == [[(0, 0), (0, 2), (2, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]
    assert blocks("x^4 + y^4 + x*y + 1") == [[(0, 0), (0, 2), (1, 1), (2, 0)], [(0, 1), (1, 0)]]
    assert len(blocks("x^4 + y^4 + x*y + y + 2")) == 1


def test_chordal_blocks_by_hand():
    """A path a - b - c is chordal: two cliques; a square of four gets a diagonal."""
    assert cones._cliques([{1}, {0, 2}, {1}]) == [[0, 1], [1, 2]]
    assert sorted(map(len, cones._cliques([{1, 3}, {0, 2}, {1, 3}, {0, 2}]))) == [3, 3]
    chain = "x^2 - x*y + y^2 - y*z + z^2"
    assert blocks(chain, chordal=True) == [[(0, 0, 1), (0, 1, 0)], [(0, 1, 0), (1, 0, 0)]]
    assert certify(chain, chordal=True).verify()


def test_chordal_blocks_prove_nothing_against_squares():
    lost = certify("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1", chordal=True, multipliers=0)
    assert lost.status == "unknown"


COEFFICIENTS = st.integers(-4, 4).filter(bool)
SUMS = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 2)), COEFFICIENTS, min_size=1, max_size=3)


@given(st.lists(SUMS, min_size=1, max_size=3), st.integers(-3, 3))
@settings(max_examples=25, deadline=None)
def test_blocks_lose_nothing(lines, more):
    """The margin over the blocks is that over the whole basis, whichever its sign."""
    p = polynomial("+".join(f"({polynomial(line)})^2" for line in lines) + f" + {more}".replace("+ -", "- "))
    program = whole(p) if p.terms else None
    if program is None or any(m not in program.monomials for m in p.support):
        return
    target = {m: float(c) / 50 for m, c in p.terms}
    one, other = (moments.solve(g, target, 1e-9, None) for g in (program, cones.split(program, p.support)))
    assert one.optimum == pytest.approx(other.optimum, abs=1e-5)


def test_zeros_and_what_vanishes_there():
    """(x^2 - 1)^2 + (y - x)^2 is 0 at (1, 1) and (-1, -1): of 1, x, y, x^2 two combinations are 0 at both."""
    p = polynomial("(x^2 - 1)^2 + (y - x)^2")
    found = faces.zeros(p, {})
    assert {(1, 1, 1), (1, -1, -1)} <= set(found)
    program = cones.Program((cones.cone([(0, 0), (1, 0), (0, 1), (2, 0)]),))
    smaller = faces.vanishing(p, program, [z for z in found if z[0]])
    assert len(smaller.cones[0].basis) == 2
    for b, (x, y) in itertools.product(smaller.cones[0].basis, ((1, 1), (-1, -1))):
        assert sum(c * x ** m[0] * y ** m[1] for m, c in b.items()) == 0
    assert faces.vanishing(p, program, []) is None


def test_orders_of_vanishing():
    """x^4 + y^2: at 0 a square is of order 1 along y and of order 2 along x, where p is of orders 2 and 4."""
    p = polynomial("x^4 + y^2")
    program = cones.Program((cones.cone([(0, 0), (1, 0), (0, 1), (2, 0)]),))
    smaller = faces.vanishing(p, program, [(Fraction(1), Fraction(0), Fraction(0))])
    assert sorted(next(iter(b)) for b in smaller.cones[0].basis) == [(0, 1), (2, 0)]


def test_a_null_space_in_fractions():
    """The moments of the points 1/2 and 3 leave one combination of 1, x, x^2 that vanishes: (2x - 1)(x - 3)."""
    rows = np.array([[1, 0.5, 0.25], [1, 3, 9]])
    (row,) = faces._null_space(rows.T @ rows)
    assert [c / row[2] for c in row] == [Fraction(3, 2), Fraction(-7, 2), 1]
    assert faces._null_space(np.eye(3)) == []
    assert len(faces._null_space(np.zeros((2, 2)))) == 2
    irrational = np.array([[1, 2**0.5, 2.0]])
    (part,) = faces._null_space(irrational.T @ irrational)  # of a zero sqrt 2 the rational part: x^2 - 2
    assert [c / part[2] for c in part] == [-2, 0, 1]


def test_goldstein_price():
    """Minimum 3 at (0, -1), where p is 0 at infinity of order 4 along two lines: without faces there is no room."""
    assert certify(f"{GOLDSTEIN_PRICE} - 3", faces=False).status == "numeric"
    found = certify(f"{GOLDSTEIN_PRICE} - 3")
    assert found.status == "exact" and found.verify() and found.numbers["faces"] == 1
    low = certify(GOLDSTEIN_PRICE, ask="bound")
    assert (low.status, low.bound, low.verify()) == ("exact", "3", True)
    assert np.array([[float(x) for x in point] for point in low.minimisers]) == pytest.approx(
        np.array([[0, -1]]), abs=1e-3
    )


@pytest.mark.parametrize(
    ("text", "bound", "count"),
    [
        ("x^4 - 3x^2", "-9/4", 2), ("(x^2 - 1)^2 + (y^2 - 4)^2 + 7", "7", 4), ("x^2 + y^2 + 1", "1", 1),
        ("(x*y - 1)^2 + y^2 + 1/3", "1/3", 0), ("7", "7", 0), ("x^4 + x^3 + 1", None, 1),
    ],
)  # fmt: skip
def test_lower_bounds_by_hand(text, bound, count):
    """The fourth has the infimum 1/3, which it never takes; the fifth is x-free; the sixth has -27/256 + 1 at -3/4."""
    low = certify(text, ask="bound")
    assert (low.status, low.verify()) == ("exact", True)
    exact = bound or str(1 - Fraction(27, 256))
    assert Fraction(low.bound) <= Fraction(exact) and float(Fraction(low.bound)) == pytest.approx(
        float(Fraction(exact)), abs=2e-4
    )
    if bound:
        assert low.bound == bound
    assert len(low.minimisers) == count
    p = polynomial(text)
    for point in low.minimisers:
        assert float(p.at([Fraction(float(x)) for x in point])) == pytest.approx(float(Fraction(exact)), abs=1e-4)


@pytest.mark.parametrize("text", ["x^3", "x", "x^2 - y^2", "x*y + x^4"])
def test_what_is_unbounded_has_no_bound(text):
    """A form below 0 somewhere has no bound; of the others no sum of squares gives one."""
    found = certify(text, ask="bound")
    assert found.status == ("not_sos" if found.point else "unknown") and found.bound == "0"


def test_squares_that_are_written():
    """Broyden's function is 0 at an irrational point: no fractions describe its face, but its text shows squares."""
    text = "((3-2*x)*x - 2*y + 1)^2 + ((3-2*y)*y - x + 1)^2"
    p = polynomial(text)
    found = certify(text)
    assert (found.status, found.verify()) == ("exact", True)
    assert certify(dict(p.terms)).status in ("exact", "numeric")
    large = certify("(x + y + z + w + 1)^12")  # more than the solver is given, and a square all the same
    assert large.verify() and len(large.squares) == 1
    wide = " + ".join(f"(x{i}^5 + 1)^2" for i in range(24))
    assert certify(wide, rules=False).reason == "the 24 squares as they are written"
    assert certify(wide).reason == "a sum of 24 squares over 25 of 118755 monomials"


def test_a_bound_with_a_multiplier():
    low = certify("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1", ask="bound")
    assert (low.status, low.bound, low.verify()) == ("exact", "0", True) and low.multiplier


@pytest.mark.parametrize(
    ("p", "nonneg", "zero", "least"),
    [
        ("x + y", ["1 - x^2 - y^2"], [], -(2**0.5)),
        ("x + y", [], ["x^2 + y^2 - 1"], -(2**0.5)),
        ("x", ["1 - x^2"], [], -1),
        ("-x - y", ["x", "y", "1 - x - 2*y", "1 - 2*x - y", "4 - x^2 - y^2"], [], -2 / 3),
        ("x*y", ["x - 1", "y - 2", "9 - x^2 - y^2"], [], 2),
        ("(x - 3)^2", [], ["x^2 - 1"], 4),
        ("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1", ["4 - x^2 - y^2"], [], 0),
    ],
)
def test_bounds_where_constraints_hold(p, nonneg, zero, least):
    asked = problem(p, nonneg, zero)
    low = certify(asked, ask="bound")
    assert (low.status, low.verify()) == ("exact", True), low
    assert float(Fraction(low.bound)) == pytest.approx(least, abs=1e-3) and Fraction(low.bound) <= least + 1e-12
    above = problem(f"{p} - ({Fraction(low.bound)}) + 1/10", nonneg, zero)
    made = certify(above)
    assert (made.status, made.verify()) == ("exact", True)
    below = certify(problem(f"{p} - ({Fraction(low.bound)}) - 1/10", nonneg, zero))
    assert below.status == "not_sos" if not zero else below.status in ("not_sos", "unknown")


def test_the_degree_is_chosen_or_stepped():
    """x on [0, 1] is x itself; 1 - x^2 on [-1, 1] of degree 2; the cubic needs more."""
    assert certify(problem("x", ["x"]), degree=2).numbers["degree"] == 2
    hard = problem("x^3 - x^2 + 1/5", ["x*(1 - x)"])
    assert certify(hard, degree=4).status == "exact"
    assert certify(problem("x*y", ["x", "y", "2 - x - y"])).status != "exact"
    assert certify(problem("x*y", ["x", "y", "2 - x - y"]), products=True).status == "exact"


def test_nothing_is_claimed_where_the_verifier_would_refuse():
    made = certify(problem("x + y", ["1 - x^2 - y^2"], ["x - y"]), ask="bound")
    assert made.verify()
    for change in ({"bound": "0"}, {"nonneg": ()}, {"weighted": ()}, {"cofactors": ((),)}, {"squares": ()}):
        assert dataclasses.replace(made, **change).refusal(), change


def test_all_minimisers_of_flat_moments():
    """Moments of three points in the plane, by hand: all three come back, wherever they lie."""
    points = np.array([[1.0, 2.0], [-0.5, 0.25], [0.0, -1.0]])
    mix = [0.5, 0.3, 0.2]
    known = {
        (i, j): sum(w * x**i * y**j for w, (x, y) in zip(mix, points, strict=True))
        for i in range(7) for j in range(7 - i)
    }  # fmt: skip
    found = minimisers._atoms(2, known, 3)
    assert sorted(map(tuple, np.round(found, 5))) == sorted(map(tuple, points))
    assert minimisers._atoms(2, {m: v + (m == (2, 2)) for m, v in known.items()}, 2) == []


def test_units_bring_coefficients_together():
    terms = dict(polynomial("1e12*x^4 + x^2*y^2 + 1e-6*y^4 + x*y + 1").terms)
    k = balance.units(terms)
    sizes = [abs(float(c)) for c in balance.scaled(terms, k).values()]
    assert max(sizes) / min(sizes) < 1e4
    assert balance.scaled(balance.scaled(terms, k), k, -1) == terms
    near = balance.floats_in_x({(1, 2): 0.75, (0, 100): -3.0, (100, 0): 0.0}, [3, 200])
    assert near == {(1, 2): 0.75 * 2.0**403, (0, 100): -sys.float_info.max, (100, 0): 0.0}
    assert not any(balance.units(dict(polynomial("3x^4 + 7y^2 + 2").terms)))
    for text in ("1e12*x^4 + x^2*y^2 + 1e-6*y^4 + x*y + 1", "(1e6*x^2 - y)^2 + (y - 1e-5)^2 + 1e-9"):
        assert certify(text).verify() and certify(text).status == "exact"
    refuted = certify("1e12*x^4*y^2 + 1e-3*x^2*y^4 - 30*x^2*y^2*z^2 + z^6/1e6", multipliers=0)
    assert refuted.status == "not_sos" and refuted.verify()


def test_swaps_by_hand():
    """x, y, z may be exchanged: of 1, x, y, z the group keeps 1 and the sum (two copies of one line) and a plane."""
    p = polynomial("(x + y + z + 1)^2 + x^2 + y^2 + z^2")
    program = cones.Program((cones.cone([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]),))
    fold = orbits.folded(program, dict(p.terms))
    assert sorted((len(part.bases_mNd), part.bases_mNd.shape[2]) for part in fold.parts) == [(1, 2), (2, 1)]
    assert fold.orbits == 4  # x^2, x y, x, 1
    assert orbits.folded(program, dict(polynomial("x^2 + 2*y^2 + 3*z^2").terms)) is None


@pytest.mark.parametrize(
    "text",
    [
        "(a + b + c + 1)^4 + a^4 + b^4 + c^4 + (a*b*c)^2", "(x + y + z)^2 + x^4 + y^4 + z^4 + x^2*y^2*z^2 + 1",
        "(a + b)^2*(x + y + 1)^2 + a^4 + b^4 + 2*x^4 + 2*y^4 + 3", "x^4 + y^4 + z^4 - 2*x*y*z*(x + y + z) - 1",
    ],
)  # fmt: skip
def test_symmetry_changes_no_margin(text):
    """The same optimum, a residual as small, and Gram matrices that are as definite."""
    p = polynomial(text)
    program = cones.split(whole(p), p.support)
    target = {m: float(c) / 20 for m, c in p.terms}
    fold = orbits.folded(program, dict(p.terms))
    one, other = moments.solve(program, target, 1e-9, None), moments.solve(program, target, 1e-9, None, fold=fold)
    assert sum(part.bases_mNd[0].size for part in fold.parts) < sum(len(c.basis) ** 2 for c in program.cones)
    assert other.optimum == pytest.approx(one.optimum, abs=1e-6) and other.residual < 1e-6
    assert min(np.linalg.eigvalsh(g)[0] for g in other.grams) == pytest.approx(one.optimum, abs=1e-5)
    assert all(abs(other.moments[m] - one.moments[m]) < 1 for m in one.moments)


def test_symmetric_proofs():
    text = "(a + b + c + d + 1)^4 + a^4 + b^4 + c^4 + d^4 + 1"
    folded, plain = certify(text), certify(text, symmetry=False)
    assert folded.verify() and plain.verify()
    assert folded.numbers["part"] == 4 and "part" not in plain.numbers


def test_a_hundred_variables():
    """The box around the monomials cannot be gone through; the lattice points of the hull can."""
    squares = [f"(x{i}^2*x{i + 1} - x{i + 2} + {i % 3 + 1})^2" for i in range(1, 98, 7)]
    found = certify(" + ".join(squares) + " + 1/7")
    assert (found.status, found.verify()) == ("exact", True) and len(found.variables) == 42
    terms = {m: c for m, c in polynomial(" + ".join(squares) + " + 1/7").terms}  # without the text, which shows squares
    assert "more than" in certify(terms, basis="newton", rules=False).reason
    assert len(certify(terms, basis="newton").basis) == 29  # by the corners of the hull


def test_a_point_below_a_bound():
    made = proof.negative(problem("x^2 + 1"), {}, bound=Fraction(2))
    assert made.verify() and made.bound == "2" and made.reason.startswith("it is below 2 at x = ")
    assert descent.below_zero(problem("x^2 + 1"), {}, Fraction(1)) is None


def far_apart(seed):
    """z'D(GG' + I)Dz over 1, x, y, x^2, x y, y^2; D of powers of 10 up to 10^6, which no units of x and y undo."""
    rng = np.random.default_rng(seed)
    basis = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    factor = rng.integers(-5, 6, (6, 6)).astype(object)
    matrix, sizes = factor @ factor.T + np.eye(6, dtype=int), [10 ** int(k) for k in rng.integers(0, 7, 6)]
    terms = {}
    for i, a in enumerate(basis):
        for j, b in enumerate(basis):
            key = (a[0] + b[0], a[1] + b[1])
            terms[key] = terms.get(key, 0) + int(matrix[i, j]) * sizes[i] * sizes[j]
    return terms


def test_each_monomial_in_units_of_its_own(monkeypatch):
    several = [far_apart(seed) for seed in range(12)]
    assert {certify(p, rules=False).status for p in several} == {"exact"}  # by a closer solution, which comes first
    monkeypatch.setattr(attempts, "_whole", lambda *given: False)
    found = [certify(p, rules=False) for p in several]
    assert {made.status for made in found} == {"exact"} and all(made.verify() for made in found)
    helped = [made for made in found if any("other units" in line for line in made.tried)]
    assert len(helped) == 3
    monkeypatch.setattr("luthier.kit.balance.by_squares", lambda program, grams: None)
    plain = [certify(p, rules=False).status for p in several]
    assert plain.count("numeric") == len(helped)


def test_units_of_monomials_by_hand():
    """Weights 1, 2^-20 and none at all: units 1, 2^-10 and the smallest; weights within 2^8 stay as they are."""
    program = cones.Program((cones.cone([(0,), (1,), (2,)]),))
    made = balance.by_squares(program, [np.diag([1.0, 2.0**-20, 0.0])])
    assert [list(b.values()) for b in made.cones[0].basis] == [[1], [Fraction(1, 2**10)], [Fraction(1, 2**33)]]
    assert balance.by_squares(program, [np.diag([1.0, 2.0**-6, 2.0**-5])]) is None
    assert balance.by_squares(program, [np.zeros((3, 3))]) is None


@pytest.mark.parametrize(
    ("ends", "asked"), [("Solved", [False]), ("AlmostSolved", [False]), ("NumericalError", [False, True])]
)
def test_linear_systems_are_refined_where_the_solver_does_not_end_well(monkeypatch, ends, asked):
    """And where both sides need not have interior points: of a lower bound, with an equation, to a fine tolerance."""
    import clarabel

    real, seen = clarabel.DefaultSolver, []

    class Watched:
        def __init__(self, *given):
            seen.append(given[-1].iterative_refinement_enable)
            self.solver = real(*given)

        def solve(self):
            found = self.solver.solve()
            assert str(found.status) == "Solved"
            return types.SimpleNamespace(
                z=found.z, x=found.x, iterations=found.iterations, solve_time=found.solve_time, status=ends
            )

    monkeypatch.setattr(clarabel, "DefaultSolver", Watched)
    p = polynomial("x^4 - 2x^2*y + 2y^2 + 1")
    program = cones.Program((cones.cone([(0, 0), (2, 0), (0, 1)]),))
    floats = {m: float(c) for m, c in p.terms}
    plain = moments.solve(program, floats, 1e-8, 10.0)
    assert (seen, plain.residual < 1e-6) == (asked, True)
    seen.clear()
    moments.solve(program, floats, 1e-12, None)
    moments.solve(program, floats, 1e-8, None, {(0, 0): 1.0})
    equation = cones.Program(program.cones, (cones.Free({(2, 0): Fraction(1)}, ((0, 0),)),))
    moments.solve(equation, floats, 1e-8, None)
    assert seen == [True] * 3


@pytest.mark.parametrize("size", [3, 40])
def test_the_first_monomial_that_no_product_gives(size):
    """By hand, where all products are formed and where each is looked for."""
    basis = [(i, j) for i in range(size) for j in range(2)]
    assert cones.unreached(basis, [(2 * size - 2, 2), (size, 1), (0, 0)]) is None
    assert cones.unreached(basis, [(0, 1), (0, 3), (2 * size - 1, 0)]) == (0, 3)
    assert cones.unreached(basis, [(2 * size - 1, 0)] * 40) == (2 * size - 1, 0)
    assert cones.unreached([], [(0, 0)]) == (0, 0) and cones.unreached(basis, []) is None
