"""Polynomials, bases and certificates: laws of the ring, and identities that hold exactly."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import SEEDS, often

from luthier.certificate import Certificate
from luthier.errors import LuthierError
from luthier.kit import cones, descent, exact, gram, moments
from luthier.kit.polynomial import canonical, graded, polynomial, rational
from luthier.kit.problem import Problem

EXPONENTS = st.tuples(*[st.integers(0, 3)] * 2)
RATIONALS = st.fractions(-9, 9, max_denominator=12)
SUMS = st.dictionaries(EXPONENTS, RATIONALS, max_size=5)
POINT = st.tuples(RATIONALS, RATIONALS)


def at(p, point):
    return p.at([point[int(v[1:]) - 1] for v in p.variables])


def text(p):
    return f"({p})"


@given(SUMS, SUMS, SUMS)
@often(20)
def test_the_laws_of_a_ring(a, b, c):
    p, q, r = (text(polynomial(s)) for s in (a, b, c))
    for left, right in (
        (f"{p} + {q}", f"{q} + {p}"), (f"{p}*{q}", f"{q}*{p}"), (f"({p} + {q}) + {r}", f"{p} + ({q} + {r})"),
        (f"({p}*{q})*{r}", f"{p}*({q}*{r})"), (f"{p}*({q} + {r})", f"{p}*{q} + {p}*{r}"), (f"{p} - {p}", "0"),
        (f"{p}*1 + 0", p), (f"{p}*0", "0"), (f"({p} + {q})^2", f"{p}^2 + 2*{p}*{q} + {q}^2"),
        (f"{p}^3", f"{p}*{p}*{p}"),
        (f"{p}/7*7", p), (f"-{p}", f"0 - {p}"), (f"{p}^0", "1"),
    ):  # fmt: skip
        assert polynomial(left) == polynomial(right), (left, right)


@given(SUMS, POINT)
@often(40)
def test_a_value_is_the_sum_of_its_terms(a, point):
    want = sum((c * point[0] ** e[0] * point[1] ** e[1] for e, c in a.items()), Fraction(0))
    p = polynomial(a)
    assert at(p, point) == want and at(polynomial(str(p)), point) == want
    assert p.degree == max((sum(e) for e, c in a.items() if c), default=0)


@given(SUMS, st.permutations(["b", "a"]))
@often(30)
def test_a_polynomial_does_not_depend_on_how_it_is_written(a, names):
    terms = list(a.items())
    one = canonical(["a", "b"], dict(terms))
    turned = {(e if names == ["a", "b"] else (e[1], e[0])): c for e, c in reversed(terms)}
    assert canonical(names, turned) == one and hash(one) == hash(canonical(names, turned))
    assert list(one.support) == graded(one.support) and len(set(one.support)) == len(one.support)


@given(st.one_of(RATIONALS, st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)))
@often(60)
def test_numbers_are_taken_exactly(value):
    got = rational(value)
    assert got == (Fraction(repr(value)) if isinstance(value, float) else value)
    assert rational(str(got)) == got


@given(st.dictionaries(st.tuples(*[st.integers(0, 6)] * 2), st.just(Fraction(1)), min_size=1, max_size=6))
@often(30)
def test_no_square_holds_what_a_basis_leaves_out(a):
    """Rules only ever strike out: the box lies in everything, consistency in the box; both hold half of each vertex
    that a square can make."""
    p = polynomial(a)
    assume(len(p.variables) == 2)
    whole, box = gram.full(p), gram.box(p)
    assert set(box) <= set(whole) and len(whole) == gram.everything(p)
    left = gram.consistent(p, box)
    assert set(left) <= set(box)
    again = gram.consistent(p, left)
    assert again == left
    for m in left:
        double = tuple(2 * e for e in m)
        others = {
            tuple(map(sum, zip(x, y, strict=True))) for x, y in itertools.combinations(left, 2) if m not in (x, y)
        }
        assert double in p.support or double in others


@given(
    st.lists(
        st.dictionaries(EXPONENTS, st.integers(-4, 4).filter(bool), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
@often(30)
def test_the_squares_a_sum_was_made_of_survive_in_its_basis(squares):
    """What a sum of squares was made of: its squares' monomials are never struck out."""
    made = "+".join(f"({polynomial(s)})^2" for s in squares)
    p = polynomial(made)
    assume(p.terms and len(p.variables) == 2 and all(len(polynomial(s).variables) == 2 for s in squares))
    basis = set(gram.consistent(p, gram.box(p)))
    held = {e for s in squares for e in s}
    assert held <= basis
    assert set(gram.newton(p, gram.box(p))) >= held


@given(st.sets(EXPONENTS, min_size=1, max_size=7))
@often(30)
def test_entries_name_every_pair_once(basis):
    basis = graded(basis)
    found = cones.cone(basis).entries
    assert sorted((i, j) for i, j, _ in found) == [(i, j) for i in range(len(basis)) for j in range(i, len(basis))]
    assert all({tuple(map(sum, zip(basis[i], basis[j], strict=True))): 1} == terms for i, j, terms in found)


@st.composite
def matrices(draw, size=None):
    n = size or draw(st.integers(1, 5))
    low = [[draw(RATIONALS) if j <= i else Fraction(0) for j in range(n)] for i in range(n)]
    return low


def times(a, b):
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in zip(*b, strict=True)]
        for row in a
    ]


@given(matrices())
@often(40)
def test_what_is_semidefinite_is_factored_back_exactly(low):
    matrix = times(low, [list(c) for c in zip(*low, strict=True)])
    factors = exact.ldl(matrix)
    assert factors is not None and all(d > 0 for d, _ in factors)
    n = len(matrix)
    for i in range(n):
        for j in range(n):
            assert sum((d * c[i] * c[j] for d, c in factors), Fraction(0)) == matrix[i][j]


@given(matrices())
@often(40)
def test_factors_exist_just_where_no_eigenvalue_is_negative(low):
    n = len(low)
    matrix = [[low[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)]
    least = float(np.linalg.eigvalsh(np.array(matrix, dtype=float)).min())
    if abs(least) > 1e-9:
        assert (exact.ldl(matrix) is not None) == (least > 0)


@given(st.sets(EXPONENTS, min_size=1, max_size=5), SEEDS, st.integers(0, 20))
@often(30)
def test_rounding_lands_exactly_in_the_affine_space(basis, seed, bits):
    basis = graded(basis)
    program = cones.Program((cones.cone(basis),))
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(basis),) * 2)
    target = {m: Fraction(int(rng.integers(-9, 9)), 3) for m in program.monomials}
    got = exact.Rounding(program, target).at([noise + noise.T], [], Fraction(1, 3), bits).grams[0]
    for m in program.monomials:
        pairs = [(i, j) for i, j, terms in program.cones[0].entries if m in terms]
        assert sum(got[i][j] * (1 if i == j else 2) for i, j in pairs) == target[m]
    assert all(got[i][j] == got[j][i] for i in range(len(basis)) for j in range(len(basis)))


@given(matrices(3))
@often(30)
def test_squares_add_up_to_the_form_they_came_from(low):
    matrix = times(low, [list(c) for c in zip(*low, strict=True)])
    basis = [(2, 0), (1, 1), (0, 1)]
    made = exact.squares(matrix, [{b: 1} for b in basis])
    form = {}
    for i, j in itertools.product(range(3), repeat=2):
        key = tuple(map(sum, zip(basis[i], basis[j], strict=True)))
        form[key] = form.get(key, Fraction(0)) + matrix[i][j]
    p = polynomial(form)
    sums = "+".join(f"{d}*({polynomial(dict(terms))})^2" for d, terms in made) or "0"
    assert polynomial(sums) == p


@given(SUMS)
@often(20)
def test_a_point_where_it_is_negative_is_one(a):
    p = polynomial(a)
    point = descent.below_zero(Problem(p), {})
    if point is not None:
        assert len(point) == len(p.variables) and p.at(point) < 0
    else:
        assert not p.terms or p.at([0] * len(p.variables)) >= 0


@given(
    st.lists(
        st.dictionaries(EXPONENTS, st.integers(-3, 3).filter(bool), min_size=1, max_size=3), min_size=1, max_size=2
    )
)
@often(8, 200)
def test_the_program_tells_sums_of_squares_from_what_is_below_zero(squares):
    """A sum of squares has no separating functional; less a hundred, it takes negative values and has one."""
    p = polynomial("+".join(f"({polynomial(s)})^2" for s in squares))
    assume(p.degree)
    basis = gram.consistent(p, gram.box(p))
    program = cones.Program((cones.cone(basis),))
    target = {m: float(c) for m, c in p.terms}
    assert set(target) <= set(program.monomials)
    scale = max(map(abs, target.values()))
    solved = moments.solve(program, {m: c / scale for m, c in target.items()}, 1e-8, 10.0)
    assert solved.optimum > -1e-5 and solved.residual < 1e-5


@given(SUMS, st.booleans())
@often(12, 300)
def test_certificates_prove_what_they_say(a, square):
    """Whatever the verdict, its own data prove it, and the verifier sees a forged one."""
    from luthier import catalogue
    from luthier.kit.context import Context

    p = polynomial(f"({polynomial(a)})^2 + 1") if square else polynomial(a)
    made = catalogue.load("sos.certify").certify(str(p), Context())
    assert not (square and made.status == "not_sos")
    if made.status in ("exact", "not_sos"):
        assert made.verify() and Certificate.from_json(made.to_json()).verify()
        forged = replace(made, status="not_sos" if made.status == "exact" else "exact")
        assert forged.refusal()


@given(st.text(max_size=30))
@often(40)
def test_certificates_are_read_or_refused(raw):
    with pytest.raises(LuthierError):
        Certificate.from_json(raw)
