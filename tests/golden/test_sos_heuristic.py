"""sos.heuristic on polynomials whose truth and whose basis are known by hand."""

import pytest

from luthier.kit import staged
from luthier.kit.context import Context
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import polynomial
from luthier.sos.certify import SumOfSquares
from luthier.sos.heuristic import Heuristic


def certify(problem, **fields):
    return Heuristic(**fields).certify(problem, Context())


COERCIVE = "(x^3 + y^3 - 2)^2 + (y^3 - z^3 + x)^2 + (z^3 + 1)^2 + x^6 + y^6 + z^6 + x^2/3 + 1/5"
"""Five monomials are enough: 1, x and the cubes. Exact reduction leaves all 20 of degree 3 or less."""


def test_a_coercive_polynomial_gets_its_five_monomials():
    found = certify(COERCIVE)
    assert (found.status, found.refusal()) == ("exact", None)
    assert set(found.basis) == {(3, 0, 0), (0, 3, 0), (0, 0, 3), (1, 0, 0), (0, 0, 0)}
    assert (found.numbers["complete"], found.numbers["programs"], found.numbers["asked"]) == (20, 1, 5)
    assert SumOfSquares().certify(COERCIVE, Context()).numbers["basis"] == 20


def test_wrong_guesses_end_at_the_complete_basis():
    """x^4 + y^4 - c x^2 y^2 is (x^2 - y^2)^2 + (2 - c) x^2 y^2: a sum of squares for c <= 2 only."""
    assert certify("x^4 + y^4 - 19/10*x^2*y^2").status == "exact"
    assert certify("x^4 + y^4 - 21/10*x^2*y^2").status == "not_sos"


def test_only_the_complete_basis_refutes():
    """A coercive polynomial that is no sum of squares: Motzkin's with small pure powers. All stages fail, the last
    one proves it, by a functional over all ten monomials."""
    found = certify("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1 + x^6/1000 + y^6/1000")
    assert (found.status, found.refusal()) == ("not_sos", None)
    assert found.functional
    assert len(found.basis) == found.numbers["complete"] == 10


@pytest.mark.parametrize("matrix", STRUCTURES)
@pytest.mark.parametrize(("n", "half", "size", "coercive"), [(4, 3, 10, True), (4, 6, 12, False), (100, 5, 8, False)])
def test_planted_ones_are_found(matrix, n, half, size, coercive):
    """With a room for rounding; a Q of low rank that nothing else than itself can be may stay `numeric`."""
    made = plant(Planting(n=n, half=half, size=size, matrix=matrix, coercive=coercive), generator(4))
    found = certify(made.polynomial)
    assert (found.status, found.refusal()) == ("exact", None)
    assert found.numbers["basis"] <= max(2 * len(made.hidden), 6)
    assert found.numbers["asked"] <= staged.bound(2, 1.5, 1.0) * found.numbers["complete"]


def test_too_many_candidates_leave_the_corners(monkeypatch):
    monkeypatch.setattr("luthier.kit.lattice.possible", lambda p: None)
    assert certify("x^4 + y^4 + x^2*y^2 + 1").status == "exact"
    left = certify("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1")
    assert (left.status, left.reason) == (
        "unknown",
        "neither squares nor a proof against them",
    )  # corners refute nothing


def test_constraints_are_not_looked_at():
    found = certify({"polynomial": "x", "nonneg": "x"})
    assert (found.status, found.reason) == ("unknown", "there are constraints")


def test_the_rules_are_asked_one_by_one():
    p = polynomial(COERCIVE)
    assert certify(p, rules="corners").numbers["asked"] == 5
    assert certify(p, rules="doubled").status == "exact"


def test_defaults_are_these():
    plain = {"rules": "both", "rho": 1.5, "faces": True, "bits": 40, "tolerance": 1e-8, "largest": 100, "seconds": None}
    assert Heuristic().to_dict()["set"] == plain


@pytest.mark.parametrize(("rules", "sizes"), [("both", [6, 5]), ("doubled", [6]), ("corners", [5])])
def test_each_rule_makes_one_guess(monkeypatch, rules, sizes):
    """x^4 is the square of x^2, which one rule takes; for the other it is x times x^3, and covered."""
    seen = []
    real = staged.staged
    monkeypatch.setattr(staged, "staged", lambda p, openings, *rest: seen.append(openings) or real(p, openings, *rest))
    assert certify(f"{COERCIVE} + x^4/7", rules=rules).status == "exact"
    assert [len(basis) for basis in seen[0]] == sizes
