"""sos.sos1k: each criterion on polynomials decided by hand, and published labels and hints that a proof contradicts."""

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.criteria import CRITERIA
from luthier.kit.polynomial import polynomial
from luthier.kit.sos1k import truth
from luthier.sos.sos1k import Cascade
from published_sos1k import LINE_239, POINT_239, SUMS

ALONE = Cascade(certifier=None)


def certify(problem, seed=0, **fields):
    return Cascade(**fields).certify(problem, Context(seed=seed))


def alone(problem, *criteria):
    """By the six criteria, or those named, without a solver."""
    return certify(problem, certifier=None, criteria=criteria or tuple(CRITERIA))


def value(text, point):
    """The polynomial's value by Python's own reading of the text."""
    numbers = {f"x{i + 1}": Fraction(x) for i, x in enumerate(point)}
    source = re.sub(r"(?<![\w.^])(\d+(?:\.\d+)?)(?![\w.])", r"Fraction('\1')", text).replace("^", "**")
    return eval(source, {"Fraction": Fraction, **numbers})


def expanded(squares):
    """{exponents: coefficient} of weighted squares, multiplied out here."""
    total = {}
    for weight, terms in squares:
        for (a, x), (b, y) in itertools.product(terms, repeat=2):
            key = tuple(e + f for e, f in zip(a, b, strict=True))
            total[key] = total.get(key, 0) + Fraction(weight) * Fraction(x) * Fraction(y)
    return {m: c for m, c in total.items() if c}


@pytest.mark.parametrize(
    ("problem", "criterion", "status"),
    [
        ("x^4*y^2*z^3 + 2x^2*y^2 + z", "degree", "not_sos"),
        ("5", "form", "exact"),
        ("-5", "point", "not_sos"),
        ("x1^4 - x2^4 + x3^4 + x1^2*x2^2", "leading", "not_sos"),
        ("-x^2*y^2 + x^4 + 1", "point", "not_sos"),
        ("1.8x^2 + 10.8x + 1.2y^2 + 4.8y + 20.82", "point", "not_sos"),  # 1.8(x + 3)^2 + 1.2(y + 2)^2 - 0.18
        ("x^2 + y^2 - 2x*y", "special", "exact"),
        ("x^2 - x + 1/4", "special", "exact"),
        ("x^2 + y^2 + 4z^2 - 5y*z", "point", "not_sos"),
        ("(x^2 + y^2 + z^2)^2 - 2x^2 - 2y^2 - 2z^2 + 1", "special", "exact"),
        ("7(x^2 + y^2 + z^2)^2 - 3x*y + y*z - x + 1", "special", "exact"),
        ("(x^2 + y^2 + z^2)^2 - 2x^2 - 2y^2 - 2z^2 + 0.999", "point", "not_sos"),
        ("3x^4 + 2x^2*y^2 + 1/7", "form", "exact"),
        ("(x - y*z^2)^2 + 0.5*(x^2 - 3)^4 + z^2", "form", "exact"),
        ("x^4 + x^2*y^2 + y^4 + x^2 + 0.1x*y + y^2 + 1 + x^2*y", "gram", "exact"),
    ],
)
def test_each_criterion(problem, criterion, status):
    found = alone(problem)
    assert (found.status, found.reason.split(":")[0]) == (status, criterion)
    assert found.refusal() is None
    assert truth(found) is (status == "exact")
    if status == "exact":
        assert expanded(found.squares) == {m: Fraction(c) for m, c in found.polynomial}
    assert len(found.tried) == 1 + list(CRITERIA).index(criterion) == found.numbers["criteria"]


@pytest.mark.parametrize(
    ("problem", "true", "said"),
    [
        ("x^4*y^2 + x^2*y^4 - 3x^2*y^2 + 1", False, ["the degree 6 is even", "no pure power of the highest degree"]),
        ("x^6 - 3x^3 + 3", True, ["one variable: a sum of squares if nonnegative, which this does not decide"]),
        ("x^4 - x^2*y^2 + y^4 + 1", True, ["a quartic in two variables: a sum of squares if"]),
        ("x^4 - x^2*y^2 + y^4 + z^4", True, ["a quartic form in three variables: a sum of squares if"]),
    ],
)
def test_what_they_do_not_decide(problem, true, said):
    """Nothing is guessed: each says why it goes on, and the last word is the certifier's."""
    found = alone(problem)
    assert found.status == "unknown" and found.refusal() and truth(found) is None
    assert found.tried[-1] == "no certifier" and len(found.tried) == 7
    for words in said:
        assert any(words in line for line in found.tried)
    asked = certify(problem)
    assert truth(asked) is true
    assert asked.tried[:6] == found.tried[:6]


def test_points_are_where_they_are_said_to_be():
    """Far out on an axis the first power of two counts; an odd degree is negative against its slope."""
    assert alone("x^2*y^2 - x^4/8 + 100").point == ("8", "0")  # 4^4/8 = 32, 8^4/8 = 512
    assert alone("x^3 + 5").point == ("-2",)
    assert alone("-x^3 - 63").point == ("0",) or alone("-x^3 - 63", "degree").point == ("1",)
    assert alone("x^3 - x^2*y + 10", "degree").point == ("-4", "0")  # -2 gives 2, -4 gives -54
    assert alone("x*y*z", "degree").point == ("-1", "-1", "-1")


def test_a_number_t_for_the_fourth_power():
    """|x|^4 - 2|x|^2 + 1 = (|x|^2 - 1)^2: at t = 1 alone the rest, 2t|x|^2 - t^2 - 2|x|^2 + 1, is a square: 0."""
    found = alone("x^4 + 2x^2*y^2 + y^4 + 2x^2*z^2 + 2y^2*z^2 + z^4 - 2x^2 - 2y^2 - 2z^2 + 1", "special")
    (square,) = found.squares
    assert square[0] == "1" and dict(square[1]) == {(2, 0, 0): "1", (0, 2, 0): "1", (0, 0, 2): "1", (0, 0, 0): "-1"}
    for less in ("x^4 + 2x^2*y^2 + y^4 + x^3", "x^4 + x^2*y^2 + y^4 + 1", "-x^4 - 2x^2*y^2 - y^4 + z^2"):
        assert "|x|^4" not in alone(less, "special").tried[0]


def test_squares_are_seen_in_texts_only():
    """Written out, at any place and power, with weights; not where something is taken away or is odd."""
    text = "2*(x1^3 - 1.5*x2)^2 + (x1 - x2 + 1)^4"
    assert alone(text, "form").status == "exact"
    assert [weight for weight, _ in alone(text, "form").squares] == ["2", "1"]
    assert alone({"polynomial": text}, "form").status == "exact"
    assert alone(polynomial(text), "form").status == "unknown"
    for other in (f"{text} - 1", f"{text} + x1", f"{text} + (x1 - x2)^3", "(x - 1)^2*(x + 1)", "0*(x - 1)^2 + x"):
        assert alone(other, "form").status == "unknown"


def test_an_equal_share_of_each_coefficient():
    """x^4 + 2x^2 + 1 has the matrices [[1, s], [s, 1]] with 2 - 2s in the middle; equal shares are s = 2/3."""
    found = alone("x^4 + 2x^2 + 1 + x^3/100", "gram")
    (first, *_) = found.squares
    assert first[0] == "1" and dict(first[1])[(0,)] == "2/3"
    assert alone("x^4 - x^2*y^2 + y^4 + 1", "gram").status == "unknown"  # a sum of squares, with another matrix
    assert alone("x^4*y^2 + x^2*y^4 - 3x^2*y^2 + 1", "gram").status == "unknown"


def test_the_order_and_who_is_asked():
    both = "-x^4 - 1"
    assert alone(both).reason.startswith("leading") and alone(both, "point", "leading").reason.startswith("point")
    assert certify("x^4 - x^2*y^2 + y^4 + 1").status == "exact"
    bounded = certify({"polynomial": "x", "nonneg": ["x"]})
    assert bounded.status == "exact" and not any("is odd" in line for line in bounded.tried)
    less = certify({"polynomial": "x", "nonneg": ["x"]}, certifier=None)
    assert (less.status, less.reason) == ("unknown", "the criteria are for problems without constraints")
    with pytest.raises(LuthierError, match="does not ask a cascade"):
        Cascade(certifier={"use": "sos.sos1k"})


def test_the_verifier_has_the_last_word(monkeypatch):
    """A criterion that is wrong is not believed: the refusal is noted and the next is asked."""
    from luthier.kit.criteria import Decision

    wrong = Decision("exact", "wrong", squares=((Fraction(1), [((1,), Fraction(1))]),))
    monkeypatch.setitem(CRITERIA, "degree", lambda look: wrong)
    found = alone("x^2 + 1")
    assert found.status == "exact" and found.reason.startswith("special")
    assert found.tried[0].startswith("degree: wrong; the verifier refuses the proof: ")


def test_defaults():
    plain = {"criteria": ["degree", "leading", "point", "special", "form", "gram"]}
    made = Cascade().to_dict()["set"]
    assert made["criteria"] == plain["criteria"] == list(CRITERIA)
    assert made["certifier"]["use"] == "sos.certify" and made["certifier"]["set"]["multipliers"] == 0


def test_truth_is_about_squares():
    """A proof with a multiplier or of a bound shows less; with a functional beside it, that there are no squares."""
    from luthier.sos.certify import SumOfSquares

    motzkin = "x^4*y^2 + x^2*y^4 - 3x^2*y^2 + 1"
    found = SumOfSquares().certify(motzkin, Context())
    assert found.status == "exact" and found.multiplier and truth(found) is False
    assert truth(SumOfSquares(ask="bound").certify("x^4 - 3x^2", Context())) is None
    assert truth(SumOfSquares().certify("x^2 - 2", Context())) is False
    assert truth(SumOfSquares().certify("x^2 + 2", Context())) is True


# --- what was published


def lower(text):
    rows = [[Fraction(x) for x in line.split()] for line in text.split("\n") if line]
    return [[rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]


def is_positive(matrix):
    """By Gauss's elimination: every pivot is positive."""
    work = [list(row) for row in matrix]
    for k in range(len(work)):
        if work[k][k] <= 0:
            return False
        for i in range(k + 1, len(work)):
            factor = work[i][k] / work[k][k]
            work[i] = [x - factor * y for x, y in zip(work[i], work[k], strict=True)]
    return True


def test_published_labels_that_are_wrong():
    """Two lines labelled no sum of squares have a positive definite Gram matrix; one labelled so is negative."""
    for text, gram, half in SUMS.values():
        basis = [(a - b, b) for a in range(half, -1, -1) for b in range(a + 1)]
        matrix, total = lower(gram), {}
        for (i, a), (j, b) in itertools.product(enumerate(basis), repeat=2):
            key = (a[0] + b[0], a[1] + b[1])
            total[key] = total.get(key, 0) + matrix[i][j]
        p = polynomial(text)
        assert {m: c for m, c in total.items() if c} == dict(p.terms) and p.variables == ("x1", "x2")
        assert is_positive(matrix)
        assert value(text, (2, -3)) == p.at((2, -3))
        assert truth(certify(text)) is True
    assert value(LINE_239, POINT_239) == polynomial(LINE_239).at([Fraction(x) for x in POINT_239]) < 0
    assert truth(alone(LINE_239)) is False


def test_published_counterexample_is_a_sum_of_squares():
    """y^2 - 3yz + 4z^2 = (y - 3z/2)^2 + 7z^2/4."""
    assert expanded([(1, [((1, 0), 1), ((0, 1), Fraction(-3, 2))]), (Fraction(7, 4), [((0, 1), 1)])]) == {
        (2, 0): 1, (1, 1): -3, (0, 2): 4,
    }  # fmt: skip
    assert alone("x^2 + y^2 + 4z^2 - 3y*z", "special").status == "exact"


@pytest.mark.parametrize("sigma", [1, 4, 16])
def test_published_place_where_nothing_is_negative(sigma):
    """Where x + y + z = 1 and |x| = 1, xy + xz + yz = 0, and s/4|x|^4 + 2|x|^2 + 8(xy + xz + yz) is s/4 + 2."""
    text = f"{sigma}/4*(x^2 + y^2 + z^2)^2 + 2(x^2 + y^2 + z^2) + 8(x*y + x*z + y*z)"
    for point in ((1, 0, 0), (Fraction(2, 3), Fraction(2, 3), Fraction(-1, 3))):
        assert sum(point) == sum(x * x for x in point) == 1
        assert polynomial(text).at(point) == Fraction(sigma, 4) + 2
    (x, y, z) = (Fraction(x) for x in alone(text, "point").point)
    assert polynomial(text).at((x, y, z)) < 0


def test_published_vector_of_monomials_lacks_one():
    """Products of two of x, ..., x^2d hold no constant; those up to degree d with 1 have what a square can hold."""
    degree, lacking = 2, [(e,) for e in range(1, 3)]
    products = {a[0] + b[0] for a, b in itertools.product(lacking, repeat=2)}
    assert 0 not in products and max(products) > degree
    assert certify("x^2 + 1").basis == () and alone("x^2 + 1", "gram").squares == (
        ("1", (((1,), "1"),)), ("1", (((0,), "1"),)),
    )  # fmt: skip


def test_published_rule_of_regularised_quadratics():
    """With x^4 + y^4 + z^4 for |x|^4 a quadratic may be nonnegative and no sum of squares, by proofs of both."""
    from luthier.sos.certify import SumOfSquares

    text = "x^4 + y^4 + z^4 + 2(x^2 + y^2 + z^2) + 8(x*y + x*z + y*z) + 2.1443"
    found = SumOfSquares().certify(text, Context())
    assert found.status == "exact" and found.multiplier and found.functional and found.refusal() is None
    assert truth(found) is False
    assert "no case in which nonnegative is enough" in alone(text, "special").tried[0]


NUMBERS = st.integers(-12, 12).map(lambda n: Fraction(n, 4))
LINES = st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 2)), NUMBERS, min_size=1, max_size=4)


@given(st.lists(LINES, min_size=1, max_size=3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_no_criterion_is_ever_wrong(lines, seed):
    """A sum of squares is never refuted; less its value somewhere, and 1, it is never proven."""
    total = " + ".join(f"({polynomial(line)})^2" for line in lines)
    for problem in (total, polynomial(total)):
        found = ALONE.certify(problem, Context(seed=seed))
        assert truth(found) in (True, None) and (found.status == "unknown" or found.verify())
    p = polynomial(total)
    below = f"{total} - {p.at([1] * len(p.variables)) + 1}"
    assert truth(ALONE.certify(below, Context(seed=seed))) in (False, None)


def test_a_descent_beyond_the_first():
    """Negative in a small place only, away from the grid: found in the end, and rounded to few places."""
    text = "(x - 3.7)^2 + (y + 2.9)^2*(x^2 + 1) + (z - 1.3)^4 - 0.001"
    found = alone(text, "point")
    assert found.status == "not_sos" and found.refusal() is None
    assert max(Fraction(x).denominator for x in found.point) <= 2**12


def test_lowest_is_keyed_by_the_seed():
    """The same seed gives the same bytes."""
    assert certify(LINE_239, seed=3, certifier=None).to_json() == certify(LINE_239, seed=3, certifier=None).to_json()


def test_hostile_texts_take_no_time_of_their_own():
    """Long runs of blanks, deep brackets, many squares, many variables: an answer, or an honest `unknown`."""
    blank = " " * 50_000
    assert alone(f"x^2 + 1{blank}- x^3 + (x)^2").status == "not_sos"
    assert alone(f"1{blank}x + (x^3 - 1)^2", "form").status == "unknown"
    assert alone("(" * 39 + "x^2" + ")" * 39 + "^2 + x", "form", "degree").status == "unknown"
    assert alone("(x - y)^2 + " * 800 + "z", "form").status == "unknown"
    assert alone(" + ".join(f"x{i}^2" for i in range(250)) + " - x1*x2*3 + 10", "special").status == "unknown"
