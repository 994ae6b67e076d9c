"""Monomial bases against slow twins, the semidefinite program by hand, rounding and factorisation in fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.kit import cones, descent, exact, gram, moments
from luthier.kit.polynomial import polynomial
from luthier.kit.problem import problem

POINTS = st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=7)
SOLIDS = st.sets(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=7)


def some(support):
    p = polynomial({m: 1 for m in support})
    return p if len(p.variables) == len(next(iter(support))) else None


def slow_consistent(support, candidates):
    """The rule word for word, until nothing changes."""
    left = set(candidates)
    while True:
        sums = {tuple(map(sum, zip(a, b, strict=True))) for a, b in itertools.permutations(left, 2)}
        gone = {a for a in left if tuple(2 * e for e in a) not in sums | set(support)}
        if not gone:
            return left
        left -= gone


@given(POINTS | SOLIDS)
@settings(max_examples=40, deadline=None)
def test_consistency_is_the_rule(support):
    p = some(support)
    if p is None:
        return
    for start in (gram.box(p), gram.full(p)):
        found = gram.consistent(p, start)
        assert set(found) == slow_consistent(p.support, start)
        assert found == [a for a in start if a in set(found)]
    assert gram.consistent(p, gram.box(p)) == gram.consistent(p, gram.full(p))


def _apart(point, support):
    """Whether some direction with small whole numbers separates the point; in this grid they suffice."""
    for dx, dy in itertools.product(range(-12, 13), repeat=2):
        if max(dx * s[0] + dy * s[1] for s in support) < dx * point[0] + dy * point[1]:
            return True
    return False


@given(POINTS)
@settings(max_examples=15, deadline=None)
def test_newton_is_the_half_polytope(support):
    p = some(support)
    if p is None:
        return
    candidates = gram.full(p)
    found = gram.newton(p, candidates)
    for a in candidates:
        double = (2 * a[0], 2 * a[1])
        assert (a in found) == (not _apart(double, p.support)), a


@given(POINTS | SOLIDS)
@settings(max_examples=15, deadline=None)
def test_each_rule_is_stricter(support):
    p = some(support)
    if p is None:
        return
    full, box = gram.full(p), gram.box(p)
    newton, consistent = gram.newton(p, box), gram.consistent(p, box)
    assert set(consistent) <= set(newton) <= set(box) <= set(full)
    assert len(full) == gram.everything(p)


@given(SOLIDS, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_planted_monomial_is_never_lost(monomials, rank):
    """Squares of random combinations: every monomial used stays."""
    basis = sorted(monomials)
    rng = np.random.default_rng(len(basis) * 7 + rank)
    factor = rng.integers(-2, 3, (len(basis), rank))
    terms = {}
    for (i, a), (j, b) in itertools.product(enumerate(basis), repeat=2):
        key = tuple(map(sum, zip(a, b, strict=True)))
        terms[key] = terms.get(key, 0) + int(factor[i] @ factor[j])
    used = [a for i, a in enumerate(basis) if factor[i].any()]
    p = polynomial(terms)
    keep = [int(v[1:]) - 1 for v in p.variables]
    if used:
        found = gram.consistent(p, gram.box(p))
        assert {tuple(a[i] for i in keep) for a in used} <= set(found)


def test_bounds_by_hand():
    p = polynomial("x^6*y^2 + x^2*y^4 + x^5*y^3")
    assert gram.box(p) == [(3, 1), (2, 2), (2, 1), (1, 2)]  # x from 1 to 3, y from 1 to 2, degree from 3 to 4
    assert gram.box(polynomial("x*y^2")) == []
    assert gram.box(polynomial("x^2*y + y^3 + 1")) == [(1, 0), (0, 1), (0, 0)]
    assert gram.everything(polynomial("x^6 + y + z")) == 20
    assert gram.full(polynomial("5")) == [()] == gram.box(polynomial("5"))


def test_many_candidates_are_not_even_listed():
    wide = polynomial("(" + " + ".join(f"x{i}^5" for i in range(60)) + ")^2 + 1")
    assert gram.box(wide) is None and gram.full(wide) is None
    odd = polynomial({(*([3] * 80), 1): 1, (*([0] * 80), 1): 1})
    assert gram.box(odd) == []


def test_entries():
    """Of x, y, 1: the upper triangle by columns."""
    found = {(i, j): next(iter(terms)) for i, j, terms in cones.cone([(1, 0), (0, 1), (0, 0)]).entries}
    assert found == {(0, 0): (2, 0), (0, 1): (1, 1), (1, 1): (0, 2), (0, 2): (1, 0), (1, 2): (0, 1), (2, 2): (0, 0)}
    assert cones.Program((cones.cone([(2,), (1,), (0,)]),)).monomials.keys() == {(4,), (3,), (2,), (1,), (0,)}


def solved(text, basis):
    p = polynomial(text)
    program = cones.Program((cones.cone(basis),))
    return p, program, moments.solve(program, {m: float(c) for m, c in p.terms}, 1e-9, None)


def test_the_margin_by_hand():
    """x^4 + a x^2 + b over x^2, x, 1: Q = [[1, 0, s], [0, a - 2s, 0], [s, 0, b]]; here s = 0 is best."""
    _, _, found = solved("2x^4 + x^2 + 2", [(2,), (1,), (0,)])
    s = 0.5 * (1 - found.optimum)  # the middle entry is the margin, and [[2, s], [s, 2]] has least eigenvalue 2 - |s|
    assert found.optimum == pytest.approx(5 / 3, abs=1e-6) or s == pytest.approx(found.grams[0][0, 2], abs=1e-5)
    assert np.linalg.eigvalsh(found.grams[0])[0] == pytest.approx(found.optimum, abs=1e-6)
    grid = max(min(1 - 2 * t, 2 - abs(t)) for t in np.linspace(-3, 3, 60001))
    assert found.optimum == pytest.approx(grid, abs=1e-4)
    assert found.residual < 1e-6


def test_a_quadratic_has_one_gram_matrix():
    _, _, found = solved("2x^2 + 2x*y + 5y^2 + 3", [(1, 0), (0, 1), (0, 0)])
    assert found.grams[0] == pytest.approx(np.array([[2, 1, 0], [1, 5, 0], [0, 0, 3]]), abs=1e-6)
    assert found.optimum == pytest.approx((7 - np.sqrt(13)) / 2, abs=1e-6)
    assert sum(found.moments[m] for m in ((2, 0), (0, 2), (0, 0))) == pytest.approx(1, abs=1e-6)


def test_the_functional_separates():
    p, _, found = solved("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1", [(2, 1), (1, 2), (1, 1), (0, 0)])
    assert found.optimum == pytest.approx(-3, abs=1e-6)
    assert sum(float(c) * found.moments[m] for m, c in p.terms) == pytest.approx(-3, abs=1e-6)


def test_central_is_well_inside():
    basis = [(2,), (1,), (0,)]
    inside_ = moments.central(cones.Program((cones.cone(basis),)), 1e-9)
    matrix = np.array([[inside_[(a[0] + b[0],)] for b in basis] for a in basis])
    assert np.trace(matrix) == pytest.approx(1, abs=1e-6)
    assert np.linalg.eigvalsh(matrix)[0] == pytest.approx(0.2, abs=1e-6)  # [[2, 0, 1], [0, 1, 0], [1, 0, 2]] / 5


def test_without_the_solver_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(LuthierError, match=r"Clarabel; pip install 'luthier\[sos\]'"):
        solved("x^2", [(1,)])


FLOATS = st.floats(-5, 5, allow_nan=False)


@given(
    st.lists(FLOATS, min_size=9, max_size=9), st.integers(0, 30), st.fractions(Fraction(1, 9), 9, max_denominator=99)
)
@settings(max_examples=60, deadline=None)
def test_rounded_matrices_have_the_coefficients(values, bits, unit):
    """Whatever the floats are, b'Qb is the target exactly, and Q is symmetric."""
    basis = [(2,), (1,), (0,)]
    p, program = polynomial("3x^4 - x^3 + x^2/7 + 2/3"), cones.Program((cones.cone(basis),))
    float_matrix = np.array(values).reshape(3, 3)
    matrix = exact.Rounding(program, dict(p.terms)).at([float_matrix + float_matrix.T], [], unit, bits).grams[0]
    for monomial in program.monomials:
        found = sum(matrix[i][j] for i in range(3) for j in range(3) if basis[i][0] + basis[j][0] == monomial[0])
        assert found == dict(p.terms).get(monomial, 0)
    assert all(matrix[i][j] == matrix[j][i] for i in range(3) for j in range(3))


def test_rounding_by_hand():
    """0.3 and 0.6 to quarters of a unit of 2: 0.5 and 1.5 (0.6 is 1.2 of 2, nearest 1); the rest is shared."""
    rounding = exact.Rounding(cones.Program((cones.cone([(2,), (1,), (0,)]),)), {(2,): Fraction(3)})
    floats = np.array([[0.5, 0, 0.3], [0, 0.6, 0], [0.3, 0, 0.5]])
    matrix = rounding.at([floats], [], Fraction(2), 2).grams[0]
    lacking = Fraction(3) - 2 * Fraction(1, 2) - 1  # x^2: twice the corner 0.5, and the middle 1
    assert matrix[0][2] == Fraction(1, 2) + lacking / 3 and matrix[1][1] == 1 + lacking / 3
    assert matrix[0][0] == matrix[2][2] == 0


MATRICES = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.fractions(-3, 3, max_denominator=6), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(MATRICES, st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_factorisation(rows, drop):
    """GG' is factored back exactly, also where it is singular; moving its diagonal down is noticed."""
    size = len(rows)
    factor = [row[: max(1, size - drop)] for row in rows]
    matrix = [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in factor] for a in factor]
    parts = exact.ldl(matrix)
    assert parts is not None and all(d > 0 for d, _ in parts)
    back = [[sum((d * c[i] * c[j] for d, c in parts), Fraction(0)) for j in range(size)] for i in range(size)]
    assert back == matrix
    least = np.linalg.eigvalsh(np.array(matrix, dtype=float))[0]
    lower = [
        [x - (i == j) * (Fraction(least) + Fraction(1, 1000)) for j, x in enumerate(r)] for i, r in enumerate(matrix)
    ]
    assert exact.ldl(lower) is None


@pytest.mark.parametrize("wrong", [[[0, 1], [1, 0]], [[-1]], [[1, 2], [2, 3]], [[0, 1], [1, 5]], [[1, 0], [0, -1]]])
def test_not_positive_semidefinite(wrong):
    assert exact.ldl([[Fraction(x) for x in row] for row in wrong]) is None


def test_numbers_too_long_to_write_are_no_proof():
    long = Fraction(1, 10**4100)
    assert exact.squares([[long]], [{(1,): 1}]) is None
    assert exact.squares([[Fraction(1, 10**3900)]], [{(1,): 1}]) is not None


def test_points():
    assert below("x^2 - 3x*y + y^2") == (1, 1)
    assert below("x^2 + x + 1") is None
    assert below("-1") == ()
    assert below({tuple(2 * (i == j) for j in range(200)): 1 for i in range(200)}) is None


def test_points_off_the_grid():
    """Between 1.41 and 1.42; far away; within constraints, at a bound, on a line."""
    for text in ("(x^2 - 2)^2 - 1/1000", "(x - 700)^2*(y - 900)^2 + (x - 700)^2 + (y - 900)^2 - 1"):
        assert polynomial(text).at(below(text)) < 0
    inside = problem("x + y", nonneg=["(x - 5)*(6 - x)", "y + 4.5"], zero=[])
    assert descent.below_zero(inside, {}) is None
    found = descent.below_zero(inside, {}, Fraction(3, 4))
    assert inside.holds(found) and sum(found) < Fraction(3, 4)
    line = descent.below_zero(problem("x", zero="x - 3*y - 1/3"), {})
    assert line is None or line[0] == 3 * line[1] + Fraction(1, 3)


def below(text):
    return descent.below_zero(problem(text), {})


def test_a_functional_only_where_it_separates():
    program = cones.Program((cones.cone([(1,), (0,)]),))
    p = dict(polynomial("x^2 + x").terms)
    low = {(2,): 0.2, (1,): -0.4, (0,): 0.8}
    middle = {(2,): 0.5, (1,): 0.0, (0,): 0.5}
    found = exact.functional(p, program, low, middle, 30)
    assert found is not None and sum(c * found[m] for m, c in p.items()) < 0
    assert exact.functional(p, program, middle, low, 30) is None
    assert exact.functional(p, program, {**low, (1,): -2.0}, middle, 30) is None  # no moment matrix of squares
    assert exact.functional(p, program, low, middle, 1) is None  # too coarse
