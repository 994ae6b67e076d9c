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
