"""The verifier of certificates: independent of everything else, deaf to corrupted and hostile data."""

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import verifier
from luthier.errors import LuthierError
from luthier.flows import Certificate
from luthier.verifier import refusal

GOOD = {
    "status": "exact", "variables": ["x", "y"], "polynomial": [[[2, 0], "1"], [[1, 1], "-1"], [[0, 2], "1/2"]],
    "squares": [["1", [[[1, 0], "1"], [[0, 1], "-1/2"]]], ["1/4", [[[0, 1], "1"]]]], "point": [], "functional": [],
    "basis": [],
}  # fmt: skip
"""x^2 - xy + y^2/2 = (x - y/2)^2 + (1/4) y^2"""
BELOW = {**GOOD, "status": "not_sos", "squares": [], "polynomial": [[[2, 0], "1"], [[1, 1], "-3"], [[0, 2], "1"]]}
POINT = {**BELOW, "point": ["1", "1"]}
FUNCTIONAL = {
    **BELOW, "basis": [[1, 0], [0, 1]], "functional": [[[2, 0], "1"], [[1, 1], "1"], [[0, 2], "1"]],
}  # fmt: skip


def test_it_shares_no_code():
    """Imports of the standard library only: the file can be read, and run, alone."""
    tree = ast.parse(Path(verifier.__file__).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("good", [GOOD, POINT, FUNCTIONAL], ids=["squares", "point", "functional"])
def test_what_is_right_is_accepted(good):
    assert refusal(good) is None


def zero(status="exact"):
    return {**GOOD, "variables": [], "polynomial": [], "squares": [], "status": status}


def test_zero_and_constants():
    assert refusal(zero()) is None
    assert "zero" in refusal(zero("not_sos"))
    minus = {**zero("not_sos"), "polynomial": [[[], "-1"]], "basis": [[]], "functional": [[[], "2"]]}
    assert refusal(minus) is None
    assert refusal({**minus, "polynomial": [[[], "1"]]}) == "the functional is not negative on the polynomial"


FRACTIONS = st.fractions(-9, 9, max_denominator=30)
SQUARES = st.lists(
    st.tuples(
        st.fractions(min_value="1/1000", max_value=9),
        st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), FRACTIONS, max_size=6),
    ),
    max_size=12,
)


@given(SQUARES, st.fractions(-1, 1))
def test_squares_add_up_as_fractions_do(squares, wrong):
    """Whatever their denominators are: multiplied out one by one, they are the polynomial, and no other."""
    total = {}
    for weight, terms in squares:
        for a, x in terms.items():
            for b, y in terms.items():
                m = (a[0] + b[0], a[1] + b[1])
                total[m] = total.get(m, 0) + weight * x * y
    made = [[str(w), [[list(m), str(c)] for m, c in terms.items()]] for w, terms in squares]
    said = {**GOOD, "squares": made, "polynomial": [[list(m), str(c)] for m, c in total.items()]}
    assert refusal(said) is None
    off = total | {(0, 0): total.get((0, 0), 0) + wrong}
    other = refusal({**said, "polynomial": [[list(m), str(c)] for m, c in off.items()]})
    assert (other is None) == (wrong == 0)


def test_denominators_that_share_nothing_stay_short():
    """A thousand squares over primes of their own: their common denominator has 25,000 bits, and is never formed."""
    primes = [n for n in range(3, 9000) if all(n % k for k in range(2, int(n**0.5) + 1))][:1000]
    squares = [[f"1/{n}", [[[i % 30, i // 30], f"1/{n}"]]] for i, n in enumerate(primes)]
    polynomial = [[[2 * (i % 30), 2 * (i // 30)], f"1/{n**3}"] for i, n in enumerate(primes)]
    assert refusal({**GOOD, "squares": squares, "polynomial": polynomial}) is None


def test_no_product_carries_from_one_variable_to_the_next():
    """Exponents lie side by side in one number: products of so many constraints are refused that one could overflow."""
    power = [[[1000, 0], "1"]]
    many = {**GOOD, "squares": [], "nonneg": [power] * 1001, "cofactors": []}
    whole = {**many, "polynomial": [[[1_000_000, 0], "1"]], "weighted": [[list(range(1000)), [["1", [[[0, 0], "1"]]]]]]}
    assert "degree above" in refusal(whole)  # no polynomial of that degree can be asked about
    few = {**many, "polynomial": [[[900, 0], "1"]], "nonneg": [[[[30, 0], "1"]]] * 1001}
    assert refusal({**few, "weighted": [[list(range(30)), [["1", [[[0, 0], "1"]]]]]]}) is None
    assert "names no product" in refusal({**few, "weighted": [[list(range(1001)), [["1", [[[0, 0], "1"]]]]]]})


@pytest.mark.parametrize(
    ("good", "change", "says"),
    [
        (GOOD, {"squares": GOOD["squares"][:1]}, "do not add up"),
        (GOOD, {"squares": [*GOOD["squares"], ["0", []]]}, "not positive"),
        (GOOD, {"squares": [*GOOD["squares"], ["1", [[[0, 0], "1"]]]]}, "do not add up"),
        (GOOD, {"polynomial": [*GOOD["polynomial"], [[0, 0], "1"]]}, "do not add up"),
        (GOOD, {"polynomial": [*GOOD["polynomial"], [[0, 2], "0"]]}, "stands twice"),
        (GOOD, {"polynomial": [[[2, 0, 0], "1"]]}, "no monomial in 2"),
        (GOOD, {"polynomial": [[[-2, 0], "1"]]}, "no monomial"),
        (GOOD, {"polynomial": [[[2.0, 0], "1"]]}, "no monomial"),
        (GOOD, {"polynomial": [[[True, 0], "1"]]}, "no monomial"),
        (GOOD, {"polynomial": [[[10**9, 0], "1"]]}, "a degree above"),
        (GOOD, {"polynomial": [[[2, 0], 1]]}, "is no fraction"),
        (GOOD, {"polynomial": [[[2, 0], "1.0"]]}, "is no fraction"),
        (GOOD, {"polynomial": [[[2, 0], "1e9999999"]]}, "is no fraction"),
        (GOOD, {"polynomial": [[[2, 0], "1/0"]]}, "over zero"),
        (GOOD, {"polynomial": [[[2, 0], "٣"]]}, "is no fraction"),
        (GOOD, {"polynomial": [[[2, 0], "9" * 5000]]}, "is no fraction"),
        (GOOD, {"variables": ["x"] * 301}, "more than 300 variables"),
        (GOOD, {"squares": [["1", [[[i, 0], "1"] for i in range(999)]]] * 30}, "products of terms"),
        (GOOD, {"status": "numeric"}, "'numeric' proves nothing"),
        (GOOD, {"status": None}, "None proves nothing"),
        (POINT, {"point": ["1", "0"]}, "not negative at the point"),
        (POINT, {"point": ["1"]}, "1 coordinates, not 2"),
        (POINT, {"point": ["1", "1", "1"]}, "3 coordinates, not 2"),
        (FUNCTIONAL, {"basis": [[1, 0]]}, "the basis lacks"),
        (FUNCTIONAL, {"basis": [[1, 0], [0, 1], [1, 0]]}, "twice"),
        (FUNCTIONAL, {"functional": [[[1, 1], "1"]]}, "negative on a square"),
        (FUNCTIONAL, {"functional": [[[2, 0], "1"], [[1, 1], "1"], [[0, 2], "99/100"]]}, "negative on a square"),
        (FUNCTIONAL, {"functional": [[[2, 0], "1"], [[1, 1], "1/2"], [[0, 2], "1"]]}, "not negative on the polynomial"),
        (FUNCTIONAL, {"functional": []}, "not negative on the polynomial"),
    ],
)
def test_what_is_wrong_is_refused(good, change, says):
    assert says in (refusal({**good, **change}) or "accepted")


def test_a_larger_basis_is_no_fault_and_a_smaller_one_is():
    """Motzkin: x^2 y, x y^2, x y, 1 must be there."""
    terms = [[[4, 2], "1"], [[2, 4], "1"], [[2, 2], "-3"], [[0, 0], "1"]]
    basis = [[2, 1], [1, 2], [1, 1], [0, 0]]
    proof = {**BELOW, "polynomial": terms, "basis": basis, "functional": [[[2, 2], "1"]]}
    assert refusal(proof) is None
    for i in range(4):
        assert "lacks" in refusal({**proof, "basis": basis[:i] + basis[i + 1 :]})
    assert refusal({**proof, "basis": [*basis, [3, 0]]}) is None
    assert "negative on a square" in refusal({**proof, "basis": [*basis, [2, 0], [0, 2]]})  # x^2 and y^2 give x^2 y^2


def test_many_monomials_are_not_struck_out_forever():
    count = 30
    wide = [[[10 * (i == j) for j in range(count)], "1"] for i in range(count)] + [[[0] * count, "-1"]]
    said = refusal({**BELOW, "variables": ["x"] * count, "polynomial": wide, "basis": [[0] * count], "functional": []})
    assert "would have to be looked at" in said


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1", "exact"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from(sorted(GOOD)), JUNK, st.sampled_from([GOOD, POINT, FUNCTIONAL]))
@settings(max_examples=200, deadline=None)
def test_junk_never_raises(key, junk, good):
    refusal({**good, key: junk})
    assert refusal({**good, "polynomial": junk}) is not None or junk in ([], {}, "")


@given(JUNK)
@settings(max_examples=50, deadline=None)
def test_what_is_no_certificate_is_refused(junk):
    assert refusal(junk) is not None


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, '{"status": "exact"}', '"a"'])
def test_files_that_are_none(text):
    with pytest.raises(LuthierError, match="no certificate"):
        Certificate.from_json(text)
