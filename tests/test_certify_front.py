"""`luthier.certify`, `luthier.lower_bound` and `luthier certify`: every way in, and never a proof that is none."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import luthier
from luthier.certificate import Certificate
from luthier.cli import main
from luthier.errors import LuthierError

MOTZKIN = "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1"
X1, X2 = sympy.symbols("x1 x2")
COEFFICIENTS = np.zeros((5, 3))
COEFFICIENTS[4, 0], COEFFICIENTS[2, 1], COEFFICIENTS[0, 2], COEFFICIENTS[0, 0] = 1, -2, 1, 0.25
SAME = [
    "x1^4 - 2*x1^2*x2 + x2^2 + 1/4",
    "x(1)**4 - 2 x(1)^2 x(2) + x(2)^2 + 0.25",
    "(x[1]^2 - x[2])^2 + 1/4",
    {(4, 0): 1, (2, 1): -2, (0, 2): 1.0, (0, 0): Fraction(1, 4)},
    X1**4 - 2 * X1**2 * X2 + X2**2 + sympy.Rational(1, 4),
    sympy.Poly(X1**4 - 2 * X1**2 * X2 + X2**2 + sympy.Rational(1, 4), X1, X2),
    COEFFICIENTS,
    ([[4, 0], [2, 1], [0, 2], [0, 0]], [1, -2, 1, 0.25]),
    (np.array([[4, 0], [2, 1], [0, 2], [0, 0]]), np.array([1, -2, 1, 0.25])),
]


def proven(made):
    assert made.verify(), made.refusal()
    assert Certificate.from_json(made.to_json()).verify()
    return made


@pytest.mark.parametrize("p", SAME, ids=lambda p: type(p).__name__)
def test_every_input_gives_the_same_certificate(p):
    made = proven(luthier.certify(p))
    assert made == luthier.certify(SAME[0]) and made.status == "exact"


def test_the_page_shows_a_real_certificate():
    page = (Path(__file__).parents[1] / "docs" / "certify.md").read_text(encoding="utf-8")
    shown = page.split("```text\n")[1].split("```")[0]
    assert f"{luthier.certify('x^4 - 2*x^2*y + y^2 + 1/3')}\n" == shown


def test_light_to_import_and_without_torch():
    code = (
        "import sys, luthier\n"
        "assert not {'numpy', 'scipy', 'clarabel', 'torch'} & set(sys.modules)\n"
        "made = luthier.certify('x^4 + x*y + y^4 + 1')\n"
        "assert made.verify() and 'torch' not in sys.modules and 'sympy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nonnegative_though_no_sum_of_squares():
    made = proven(luthier.certify(MOTZKIN))
    assert made.status == "exact" and made.multiplier
    assert proven(luthier.certify(MOTZKIN, multipliers=0)).status == "not_sos"


def test_constraints():
    made = proven(luthier.certify("1 - x*y", nonneg=["1 - x^2 - y^2"]))
    assert made.status == "exact" and made.weighted and len(made.nonneg) == 1
    assert proven(luthier.certify("x*y", zero="x - y")).status == "exact"
    assert proven(luthier.certify("x", nonneg="1 - x^2")).point
    assert proven(luthier.certify(X1, nonneg=[X1, 1 - X1])).status == "exact"


@pytest.mark.parametrize(
    ("p", "given", "bound"),
    [
        ("x^4 - 3*x^2", {}, "-9/4"),
        ("x^2 + 2*x + 3", {}, "2"),
        ("x", {"nonneg": ["1 - x^2"]}, "-1"),
        ("x + y", {"zero": ["x^2 + y^2 - 2"]}, "-2"),
        ("7/3", {}, "7/3"),
    ],
)
def test_lower_bounds(p, given, bound):
    made = proven(luthier.lower_bound(p, **given))
    assert (made.status, made.bound) == ("exact", bound)
    assert abs(made.numbers.get("bound", float(Fraction(bound))) - float(Fraction(bound))) < 1e-5


def test_squares_that_a_text_shows_are_seen(tmp_path, capsys):
    """Over irrational numbers none would be found; and the text gets to the method by every way."""
    p = "(x^3 - x - 1)^2 + (y^3 - x - 1)^2 + (x^3 - y - 1)^2"
    made = [luthier.certify(p), luthier.certify(p, zero=[])]
    out = said(capsys, p, "--json")[1]
    (tmp_path / "p.jsonl").write_text(f'{{"polynomial": "{p}"}}\n')
    main(["certify", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "r.jsonl")])
    row = json.loads((tmp_path / "r.jsonl").read_text())
    made += [Certificate.from_json(out), Certificate.from_json(json.dumps(row["certificate"]))]
    assert len(set(map(str, made))) == 1 and proven(made[0]).status == "exact"


def test_there_may_be_no_bound():
    for p in ("x", "x^3 + y^2", "-x^2", "x*y"):
        made = luthier.lower_bound(p)
        assert made.status != "exact" and (made.verify() or made.status in ("unknown", "numeric"))


def test_another_method_and_its_fields():
    assert luthier.certify("x^2 + 1", use="sos.certify", bits=10).status == "exact"
    with pytest.raises(LuthierError, match="did you mean 'bits'"):
        luthier.certify("x^2", bit=3)
    with pytest.raises(LuthierError, match="did you mean 'sos.certify'"):
        luthier.certify("x^2", use="sos.certfy")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: luthier.certify("x +"), "column 4"),
        (lambda: luthier.certify("x", nonneg=["y", "y^^2"]), "nonneg 2: column 3"),
        (lambda: luthier.certify("x", zero=[sympy.sin(X1)]), "zero 1: "),
        (lambda: luthier.lower_bound(None), "expected a polynomial"),
        (lambda: luthier.certify("x", nonneg=["y"] * 201), "201 constraints"),
        (lambda: luthier.certify("x>=0"), "alone"),
        (lambda: luthier.certify("x" * 10_000_000), "10000000 characters"),
        (lambda: luthier.certify("x", nonneg=["(" * 50_000]), "nest deeper"),
        (lambda: luthier.certify({(10**9,): 1}), "degree"),
    ],
)
def test_faults_are_one_line(call, says):
    with pytest.raises(LuthierError) as caught:
        call()
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 900


TRUTH = {
    "0": True, "7": True, "-7": False, "1/1000000000000": True, "-1/1000000000000": False,
    "x": False, "x^2": True, "-x^2": False, "x^3": False, "x^2 - 2*x + 1": True, "x^2 - 2*x + 0.999999": False,
    "x^200": True, "x^256 + x": False, "x^2*y^2": True, "(x + y)^2": True, "(x + y + z)^4": True,
    "(x - y)^2*(x + y - 1)^2": True, "x*y": False, "x^2*y^2 - 1": False, "x^2*y^2 + 2*x*y + 1": True,
    "x^4*y^4*z^4": True, "x^2*y": False, "(x^2 + y^2 - 1)^2": True, "x1^2*x2^2 + x3^2*x4^2 - 2*x1*x2*x3*x4": True,
}  # fmt: skip
"""Degenerate polynomials, and whether they are nonnegative."""


@pytest.mark.parametrize("p", TRUTH)
def test_degenerate_polynomials(p):
    """The true verdict, or none; here most lie on the boundary, where a proof need not be found."""
    made = luthier.certify(p)
    if made.status in ("exact", "not_sos"):
        proven(made)
    assert made.status != ("not_sos" if TRUTH[p] else "exact")
    if not TRUTH[p]:
        assert made.status == "not_sos", made.reason


@pytest.mark.parametrize("size", [3, 6, 9, 12])
def test_coefficients_from_1_to_10_to_the_12(size):
    """Each square of its own size; less a little they are no longer nonnegative."""
    big = 10**size
    made = luthier.certify(f"{big}*(x - y)^2 + (x + y)^2 + {big}*x^4 + 1")
    assert proven(made).status == "exact"
    for p in (f"{big}*x^2 - 2*{big}*x + {big - 1}", f"x^4 - {2 * big}*x^2 + {big * big - 1}", f"{big}*x^4 - y^2",
              f"x^2 - 1/{big}"):  # fmt: skip
        made = luthier.certify(p)
        assert made.status != "exact" and (made.status != "not_sos" or made.verify())


HUGE = {
    "1e400*x^2 + 1": "exact", "x^3*1e400 + y^2": "not_sos", "-1e400": "not_sos",
    "1e400": "exact", "1e2000*x^2 + 1e1500*x*y + 1e2100*y^2": "exact", "(x - 1e200)^2": "exact",
    "1e400*x^2 - 1": "not_sos",
}  # fmt: skip


@pytest.mark.parametrize("p", HUGE)
def test_coefficients_beyond_the_range_of_floats(p):
    """What is lost in floats is asked again for a multiple; no verdict is false, and no call fails."""
    assert proven(luthier.certify(p)).status == HUGE[p]
    assert luthier.lower_bound(p).status in ("exact", "not_sos", "numeric", "unknown")
    assert str(proven(luthier.load("sos.certify").apply(problem=p)).problem) == str(luthier.certify(p).problem)


@pytest.mark.parametrize(
    ("p", "given", "status"),
    [
        ("1e400*x", {"nonneg": ["1e400*x"]}, "exact"),
        ("1e-400*x*y", {"nonneg": ["1e350*x", "y"], "products": True}, "exact"),
        ("1e400*x*y", {"zero": ["1e-400*x - 1e-400*y"]}, "exact"),
        ("x", {"nonneg": ["1e400 - x^2"]}, "not_sos"),
    ],
)
def test_constraints_beyond_the_range_of_floats(p, given, status):
    made = proven(luthier.certify(p, **given))
    assert made.status == status
    bound = luthier.lower_bound(p, **given)
    assert bound.verify() or bound.status in ("numeric", "unknown")


def test_far_apart_and_beyond_the_range_of_floats():
    assert luthier.certify("1e400*x^4 - x*y + y^4 + 1").status in ("exact", "numeric", "unknown")
    assert luthier.certify("1e400*x^4 - x*y + y^4 + 1e-400").status != "exact"


def test_a_bound_beyond_the_range_of_floats():
    made = proven(luthier.lower_bound("1e400*x^4 - 3e400*x^2"))
    assert made.status == "exact" and Fraction(made.bound) == Fraction(-9, 4) * 10**400


def test_what_is_negative_is_not_called_numeric():
    """By less than the solver sees: a point says it."""
    for p in ("x^2 - 1e-400", "x^4 - 2e12*x^2 + 999999999999999999999999"):
        assert luthier.certify(p).status != "exact"
    made = proven(luthier.certify("x^2 - 1e-9"))
    assert made.status == "not_sos" and made.point


def test_time_limits_give_a_verdict():
    made = luthier.certify("(x + y + z + w)^6 + x^6 + 1", basis="full", seconds=1e-6)
    assert made.status in ("unknown", "numeric") or made.verify()
    assert made.reason and made.tried


def test_too_large_says_how_large():
    dense = "(1 + " + " + ".join("abcdefgh") + ")^6 + " + " + ".join(f"{v}^6" for v in "abcdefgh")
    made = luthier.certify(f"{dense} - a/1000", largest=60)
    assert made.status == "unknown" and "60" in made.reason and "GiB" in made.reason


def test_memory_is_estimated_before_the_solve(monkeypatch):
    """Where larger blocks than usual are allowed and there is no room for them."""
    p = "x^4 + y^4 + z^4 + x + y + z + 5"
    for free, status in ((1000, "unknown"), (1 << 40, "exact"), (None, "exact")):
        monkeypatch.setattr("luthier.engine.room.free_memory", lambda free=free: free)
        made = luthier.certify(p, largest=200)
        assert made.status == status and ("GiB of memory" in made.reason) == (status == "unknown")
        assert luthier.certify(p).status == "exact"


EXPONENTS = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda e: sum(e) <= 4)
SUMS = st.dictionaries(EXPONENTS, st.fractions(-3, 9, max_denominator=6), min_size=1, max_size=6)
POINTS = st.lists(st.tuples(*[st.fractions(-4, 4, max_denominator=8)] * 2), min_size=20, max_size=20)


def value(terms, point):
    return sum((c * point[0] ** i * point[1] ** j for (i, j), c in terms.items()), Fraction(0))


@settings(max_examples=40)
@given(SUMS, POINTS)
def test_what_is_exact_is_never_negative(terms, points):
    made = luthier.certify(terms)
    if made.status in ("exact", "not_sos"):
        proven(made)
    if made.status == "exact":
        assert all(value(terms, point) >= 0 for point in points)


@settings(max_examples=30)
@given(SUMS, SUMS, POINTS)
def test_what_is_exact_holds_where_the_constraints_do(terms, constraint, points):
    """On p and a single g: where g >= 0, p is never below the bound."""
    made = luthier.lower_bound(terms, nonneg=[constraint, {(0, 0): 4, (2, 0): -1, (0, 2): -1}], steps=0)
    if made.status in ("exact", "not_sos"):
        proven(made)
    if made.status == "exact":
        for point in points:
            if value(constraint, point) >= 0 and point[0] ** 2 + point[1] ** 2 <= 4:
                assert value(terms, point) >= Fraction(made.bound)


SQUARES = st.lists(st.dictionaries(EXPONENTS.filter(lambda e: sum(e) <= 2), st.integers(-3, 3), max_size=4), max_size=3)


@settings(max_examples=30)
@given(SQUARES)
def test_sums_of_squares_are_never_refuted(squares):
    """With room for rounding they are proven."""
    terms = {(4, 0): Fraction(1), (0, 4): Fraction(1), (2, 2): Fraction(1), (0, 0): Fraction(1)}
    terms |= {(2, 0): Fraction(1), (0, 2): Fraction(1)}
    for square in squares:
        for a, x in square.items():
            for b, y in square.items():
                key = (a[0] + b[0], a[1] + b[1])
                terms[key] = terms.get(key, Fraction(0)) + x * y
    assert proven(luthier.certify(terms)).status == "exact"


def said(capsys, *words):
    code = main(["certify", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_prints_the_identity(capsys):
    code, out, _ = said(capsys, "x^4 - 2*x^2*y + y^2 + 1/3")
    assert code == 0
    assert out.startswith("exact: ")
    assert out.splitlines()[1:] == ["x^4 - 2*x^2*y + y^2 + 1/3", "= (x^2 - y)^2 + 1/3*(1)^2"]
    code, out, _ = said(capsys, "x^2 - 1", "--timeout", "60s")
    assert code == 1 and out.startswith("not_sos: it is negative at x = 0\nx^2 - 1\n")
    code, out, _ = said(capsys, "--", "-x^2+1")
    assert code == 1 and out.startswith("not_sos: ")


def test_the_command_line_prints_other_forms(capsys):
    code, out, _ = said(capsys, "x", "--where", "0 <= x <= 1", "--json")
    made = Certificate.from_json(out)
    assert code == 0 and proven(made).nonneg and len(made.nonneg) == 2
    code, out, _ = said(capsys, "x*y", "--zero", "x - y", "--latex")
    assert code == 0 and r"\begin{align*}" in out
    code, out, _ = said(capsys, "x", "--bound", "--nonneg", "1 - x^2", "--lean")
    assert code == 0 and "(nonneg_0 : 0 ≤ (-x^2 + 1 : ℝ)) :\n    (-1 : ℝ) ≤ (x : ℝ)" in out
    code, _, err = said(capsys, "x^4 + x*y^3 + y^4 - 3x^2*y*z - 4x*y^2*z + 2x^2*z^2 + x*z^3 + y*z^3 + z^4", "--lean")
    assert code == 2 and "numeric has no proof" in err


def test_a_problem_that_takes_too_long(capsys):
    code, out, _ = said(capsys, "(x + y + z + w + 1)^8 + x^8 + 1", "--set", "basis=full", "--timeout", "0.1")
    assert code == 1 and out.startswith("unknown: stopped after 0.1 s\n")
