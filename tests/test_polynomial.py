"""Polynomials from text, maps and SymPy: exact, canonical, and bounded whatever comes in."""

import contextlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.kit.polynomial import MAX_BITS, Polynomial, polynomial, relations

X = ("x", "y")


def terms(text):
    return dict(polynomial(text).terms)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x^4 + 2*x**2*y - 1/3", {(4, 0): 1, (2, 1): 2, (0, 0): Fraction(-1, 3)}),
        ("2x y + 3 x^2y", {(1, 1): 2, (2, 1): 3}),
        ("(x + y)^2 (x - y)^2 / 4", {(4, 0): Fraction(1, 4), (2, 2): Fraction(-1, 2), (0, 4): Fraction(1, 4)}),
        ("-x^2 - -y", {(2, 0): -1, (0, 1): 1}),
        ("+x - (y - x)", {(1, 0): 2, (0, 1): -1}),
        ("0.1x + .5 y", {(1, 0): Fraction(1, 10), (0, 1): Fraction(1, 2)}),
        ("x + 2. - 1e-3 + 1.5E2", {(1,): 1, (0,): Fraction(151999, 1000)}),
        ("2/3/4*x*y", {(1, 1): Fraction(1, 6)}),
        ("x*y - y*x + x*y", {(1, 1): 1}),
        ("(x + 0*y + y)^(2) - 2 x y", {(2, 0): 1, (0, 2): 1}),
        ("x^0 y + x - x^1", {(1,): 1}),
        ("2(x+1)(y)", {(1, 1): 2, (0, 1): 2}),
        ("\n x\t+\n y ", {(1, 0): 1, (0, 1): 1}),
    ],
)  # fmt: skip
def test_what_text_means(text, expected):
    assert terms(text) == expected


def test_names():
    """Natural order, indices in brackets, and only those that occur."""
    assert polynomial("x10 + x2 + x_b + alpha").variables == ("alpha", "x2", "x10", "x_b")
    assert polynomial("x(1)^2 + x[2]") == polynomial("x1^2 + x2")
    assert polynomial("xy + z - z").variables == ("xy",)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("x^2 + ", 7, "ends too soon"),
        ("", 1, "ends too soon"),
        ("(x + y", 7, "ends too soon"),
        ("x + y)", 6, "')' does not fit"),
        ("x 2", 3, "write a power as x^2"),
        ("2 3", 3, "does not fit"),
        ("x^-2", 3, "an exponent is a whole number"),
        ("x^0.5", 3, "an exponent is a whole number"),
        ("x^y", 3, "an exponent is a whole number"),
        ("x^(2", 5, "ends too soon"),
        ("x^2^3", 4, "use brackets"),
        ("x^257", 3, "at most 256"),
        ("x^1000000000000000000000", 3, "too large"),
        ("(x^200)^2", 8, "the degree is above 256"),
        ("x^200 y^57", 7, "the degree is above 256"),
        ("1/x", 2, "division by a variable"),
        ("x/(y - y)", 2, "division by zero"),
        ("x/0", 2, "division by zero"),
        ("sin(x)", 1, "reads like a function"),
        ("x(y + 1)", 1, "write x*(...)"),
        ("x² + 1", 2, "write ^2"),
        ("x − 1", 3, "write -"),
        ("x >= 0", 3, "alone, without >"),
        ("1,5*x", 2, "decimals take a point"),
        ("__import__('os')", 12, "no meaning"),
        ("x;y", 2, "no meaning"),
        ("1..2", 3, "does not fit"),
        ("х + 1", 1, "no meaning"),  # a Cyrillic letter
        ("x + * y", 5, "'*' does not fit"),
        ("(" * 41 + "x" + ")" * 41, 41, "nest deeper than 40"),
        ("9" * 2501, 1, "more than 2500 digits"),
        ("1e2501", 1, "more than 2500 digits"),
        ("1e99999999999", 1, "more than 2500 digits"),
        ("(9^250)^20", 8, f"beyond {MAX_BITS} bits"),
        ("(a+b+c+d+e+f+g+h)^40", 18, "too large when multiplied out"),
    ],
)
def test_errors_name_the_column(text, column, says):
    with pytest.raises(LuthierError) as caught:
        polynomial(text)
    assert caught.value.where == f"column {column}"
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x+" * 50_001 + "x", "100003 characters"),
        ("x" * 65, "65 letters"),
        (" + ".join(f"x{i}" for i in range(257)), "257 variables"),
        ("(" * 99_000, "nest deeper"),
        ("-" * 99_000, "ends too soon"),
        ("+".join(f"x/{1_000_003 + 2 * i}" for i in range(6000)), "bits"),
        ("*".join(["(x+y+z)"] * 12_000), "degree is above|too large"),
        ("*".join(["(1+x+y+z)"] * 90), "too large"),
        ("*".join(["9999999999"] * 9000), "bits"),
    ],
)  # fmt: skip
def test_hostile_text_is_refused(text, says):
    """Each within a second or so: what a text may cost is counted, not timed."""
    with pytest.raises(LuthierError, match=says):
        polynomial(text)


def exps(*rows):
    return np.array(rows)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array([[1, 0, 2], [0, 0, 0], [3, 0, 0.1]]), "1/10*x1^2*x2^2 + 3*x1^2 + 2*x2^2 + 1"),
        (np.array([0, 0, 5]), "5*x1^2"),
        (np.array(3), "3"),
        (np.zeros((2, 3)), "0"),
        (np.zeros(0), "0"),
        (np.array([0.1, 0.3], dtype=np.float32), "3/10*x1 + 1/10"),
        (np.array([Fraction(1, 3), 2], dtype=object), "2*x1 + 1/3"),
        (np.array([[[0, 1]]], dtype=np.int8), "x3"),
        (np.float32(0.1), "1/10"),
        ((exps([2, 0], [0, 2], [2, 0]), np.array([1.5, 2, 1])), "5/2*x1^2 + 2*x2^2"),
        (([[2, 0], (0, 2)], [1, "1/3"]), "x1^2 + 1/3*x2^2"),
        (([[1], [1]], [1, -1]), "0"),
        (([], []), "0"),
    ],
)
def test_arrays(value, expected):
    assert str(polynomial(value)) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array(["x"]), "holds no coefficients"),
        (np.array([1j]), "holds no coefficients"),
        (np.array([True]), "holds no coefficients"),
        (np.array([np.nan]), "nan is no rational number"),
        (np.array([np.inf]), "inf is no rational number"),
        (np.array([None], dtype=object), "no rational number"),
        (np.ones((30, 30, 30)), "27000 terms"),
        (np.eye(1, 300, 299)[0], "degree 299"),
        ((2, 0), "a pair that is no"),
        ((np.array(3), 2), "a pair that is no"),
        (([[2, 0]], [1, 2]), "1 rows of exponents and 2"),
        ((exps([-1]), [1]), "no tuple of exponents"),
        ((exps([1.0]), [1]), "no tuple of exponents"),
        ((exps([10**9]), [1]), "degree 1000000000"),
        ((np.zeros((1, 300), int), [1]), "300 variables"),
        ((exps([1], [2])[0], [1]), "is no row of exponents"),
        ((np.ones((2, 3, 4)), [1, 1]), "is no row of exponents"),
        ((np.zeros((20_001, 1), int), np.ones(20_001)), "at most 20000"),
        (([[1], [1, 2]], [1, 1]), "exponents of 1 and of 2 variables"),
        ([1, 2], "expected a polynomial"),
    ],
)
def test_arrays_that_hold_no_polynomial(value, says):
    with pytest.raises(LuthierError, match=says) as caught:
        polynomial(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sign", "expected"),
    [
        ("1 - x^2 >= 0", ">=", ["-x^2 + 1"]),
        ("x^2 <= 1", ">=", ["-x^2 + 1"]),
        ("0 <= x <= y", ">=", ["x", "-x + y"]),
        ("1 >= x >= y", ">=", ["-x + 1", "x - y"]),
        ("x = y", "=", ["x - y"]),
        ("x == y = z2", "=", ["x - y", "y - z2"]),
        ("x >= x", ">=", ["0"]),
    ],
)
def test_relations(text, sign, expected):
    assert relations(text)[0] == sign
    assert [str(p) for p in relations(text)[1]] == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x", "holds no relation"),
        ("x > 0", "column 3: '>' has no meaning in a constraint; write >="),
        ("x ≤ 0", "column 3: '≤' has no meaning in a constraint; write <="),
        ("x <= y = z", "do not go together"),
        ("0 <= x >= y", "do not go together"),
        ("x >= ", "column 6: the polynomial ends too soon"),
        ("x >= y >= 2 +* 3", "column 14: '*' does not fit"),
        ("1" + ">=1" * 9, "do not go together"),
        ("x >= " + "y+" * 60_000, "the relation has 120005 characters"),
        ("", "holds no relation"),
    ],
)
def test_relations_that_are_none(text, says):
    with pytest.raises(LuthierError) as caught:
        relations(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_large_but_honest_text_is_read():
    assert polynomial("+".join(["x"] * 40_000)).terms == (((1,), 40_000),)
    assert len(polynomial("(1 + x + y + z)^12").terms) == 455


def test_maps_and_numbers():
    assert polynomial({(2, 0): 1, (0, 0): Fraction(1, 3)}) == polynomial("x1^2 + 1/3")
    assert polynomial({(1, 1): 0.1, (0, 2): "2/7", (3, 0): 0}) == polynomial("0.1*x1*x2 + 2/7*x2^2")
    assert polynomial({}) == polynomial(0) == polynomial("x - x") == Polynomial((), ())
    assert polynomial(0.1) == polynomial("1/10") == polynomial(Fraction(1, 10))
    again = polynomial("x + 1")
    assert polynomial(again) is again


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({(1,): 1, (1, 2): 1}, "exponents of 1 and of 2 variables"),
        ({(1.0,): 1}, "no tuple of exponents"),
        ({(-1,): 1}, "no tuple of exponents"),
        ({(True,): 1}, "no tuple of exponents"),
        ({"x": 1}, "no tuple of exponents"),
        ({(10**9,): 1}, "degree 1000000000"),
        ({(1,) * 257: 1}, "257 variables"),
        ({(1,): float("nan")}, "no rational number"),
        ({(1,): float("inf")}, "no rational number"),
        ({(1,): "1/0"}, "no rational number"),
        ({(1,): "1e400000000"}, "no rational number"),
        ({(1,): True}, "no rational number"),
        ({(1,): 1j}, "no rational number"),
        ({(1,): 2**MAX_BITS}, "bits"),
        ({(i,): 1 for i in range(20_001)}, "20001 terms"),
        ({(i,): Fraction(1, 2**89 - 2 * i) for i in range(200)}, "common denominator"),
        (True, "expected a polynomial, got bool"),
        (None, "expected a polynomial, got NoneType"),
        ([1, 2], "expected a polynomial, got list"),
    ],
)
def test_what_is_no_polynomial(value, says):
    with pytest.raises(LuthierError, match=says):
        polynomial(value)


def test_sympy_objects_that_are_something_else():
    sympy = pytest.importorskip("sympy")
    x = sympy.symbols("x")
    for wrong in (sympy.Eq(x**2, 1), x**2 >= 0, sympy.Ne(x, 1)):
        with pytest.raises(LuthierError, match="is a relation, not a polynomial"):
            polynomial(wrong)
    for wrong in (sympy.Poly(x**2 + 7, x, modulus=5), sympy.Poly(3, x, modulus=5)):
        with pytest.raises(LuthierError, match="counts modulo 5"):
            polynomial(wrong)


def test_sympy_objects():
    sympy = pytest.importorskip("sympy")
    x, y, z = sympy.symbols("x y z")
    expected = polynomial("x^2*y + y^2/3 - 2")
    assert polynomial(x**2 * y + y**2 / 3 - 2) == expected
    assert polynomial(sympy.Poly(x**2 * y + y**2 / 3 - 2, y, x, z)) == expected
    assert polynomial((x + y) ** 2) == polynomial("x^2 + 2x*y + y^2")
    assert polynomial(sympy.Rational(1, 3)) == polynomial("1/3")
    assert polynomial(x * 0.1) == polynomial("0.1*x")
    for wrong in (sympy.sqrt(2) * x, sympy.pi * x**2):
        with pytest.raises(LuthierError, match="no rational number|no polynomial"):
            polynomial(wrong)
    for wrong in (1 / x, sympy.sin(x), x**y, sympy.sqrt(x), abs(x)):
        with pytest.raises(LuthierError, match="no polynomial"):
            polynomial(wrong)
    with pytest.raises(LuthierError, match="degree"):
        polynomial(x**1000)


@pytest.mark.parametrize("number", [2**MAX_BITS - 1, Fraction(2**MAX_BITS - 1, 2**MAX_BITS - 3), Fraction(1, 10**2466)])
def test_the_longest_numbers_read_back(number):
    p = polynomial({(1,): number, (0,): -1})
    assert polynomial(str(p)) == p


EXPONENTS = st.tuples(st.integers(0, 5), st.integers(0, 5))
COEFFICIENTS = st.fractions(max_denominator=10**6)
SUMS = st.dictionaries(EXPONENTS, COEFFICIENTS, max_size=8)


@given(SUMS)
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_back(found):
    p = polynomial(found)
    assert polynomial(str(p)) == p
    assert all(c for _, c in p.terms)


@given(SUMS, SUMS, st.tuples(COEFFICIENTS, COEFFICIENTS))
@settings(max_examples=60, deadline=None)
def test_text_computes_like_numbers(a, b, point):
    """The value of a product, a sum and a power is that of the values."""
    left, right = (polynomial(s) for s in (a, b))
    values = {"x1": point[0], "x2": point[1]}

    def at(p):
        return p.at([values[v] for v in p.variables])

    assert at(polynomial(f"({left}) * ({right})")) == at(left) * at(right)
    assert at(polynomial(f"({left}) - ({right})")) == at(left) - at(right)
    assert at(polynomial(f"-({left})^2 / 7")) == -(at(left) ** 2) / 7


@given(st.text(alphabet="x1 +-*/^().e²y2[]=", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text):
    try:
        assert isinstance(polynomial(text), Polynomial)
    except LuthierError as fault:
        assert "\n" not in str(fault)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_letters_are_read_or_refused(text):
    with contextlib.suppress(LuthierError):
        polynomial(text)
