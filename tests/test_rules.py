"""Rules of thumb and the complete candidates, against hand examples and slow, obvious twins."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.kit import gram, lattice, rules, staged
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import polynomial

MOTZKIN = "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1"


def test_motzkin_by_hand():
    """Half its polytope holds 1, xy, x^2 y, x y^2; all four squares occur; its corners are all but xy."""
    p = polynomial(MOTZKIN)
    every = [(2, 1), (1, 2), (1, 1), (0, 0)]
    assert lattice.possible(p) == every
    assert rules.doubled(p, every) == every
    assert rules.uncovered(p, [(2, 1), (1, 2), (0, 0)]) == [(2, 2)]
    assert rules.corners(p, every) == every  # repair adds xy, the one monomial whose square is missing


def test_repair_by_hand():
    """x^4 + 2x^3 y + 3x^2 y^2 + y^4 from x^2 and y^2: x^3 y and nothing else is missing, and x^2 * xy gives it."""
    p = polynomial("x^4 + 2x^3*y + 3x^2*y^2 + y^4")
    assert rules.uncovered(p, [(2, 0), (0, 2)]) == [(3, 1)]
    assert rules.repaired(p, [(2, 0), (0, 2)]) == [(2, 0), (1, 1), (0, 2)]


def test_repair_adds_what_helps_most():
    """Missing are x^3, x^2 y and x: beside x^2 they ask for x, y, and for nothing that is a monomial."""
    p = polynomial("x^4 + x^3 + x^2*y + x*y + x^2")
    assert rules.uncovered(p, [(2, 0)]) == [(3, 0), (2, 1), (2, 0), (1, 1)]
    assert rules.repaired(p, [(2, 0)]) == [(2, 0), (1, 0), (0, 1)]
    assert rules.repaired(p, [(2, 0)], within=[(1, 0)]) == [(2, 0), (1, 0)]  # and it stops where nothing helps


def test_scores_decide_between_equals():
    """From 1, x^2 y^2 takes itself or xy, each once; the one of higher degree comes first unless a score says more."""
    p = polynomial("x^2*y^2 + 1")
    assert rules.repaired(p, [(0, 0)]) == [(2, 2), (0, 0)]
    assert rules.repaired(p, [(0, 0)], scores={(1, 1): 1.0}) == [(1, 1), (0, 0)]


def test_an_empty_basis_is_given_a_start():
    assert rules.repaired(polynomial("x^2 + 2*x + 1"), []) == [(1,), (0,)]
    assert rules.repaired(polynomial("x^3"), []) == []


def brute(points):
    """Lattice points of a hull by one exact program a point: no functional, no rounding."""
    from scipy.optimize import linprog

    low, high = points.min(axis=0), points.max(axis=0)
    found = []
    for a in itertools.product(*(range(x, y + 1) for x, y in zip(low, high, strict=True))):
        rows = np.vstack([points.T, np.ones(len(points))])
        answer = linprog(np.zeros(len(points)), A_eq=rows, b_eq=np.append(a, 1), method="highs")
        found += [a] if answer.status == 0 else []
    return set(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_hull_loses_no_point(seed):
    points = np.random.default_rng(seed).integers(0, 5, (6, 3))
    assert brute(points) <= set(map(tuple, lattice.hull(points).tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_programs_lose_no_point_either(seed, monkeypatch):
    monkeypatch.setattr(lattice, "WIDE", 0)
    monkeypatch.setattr(lattice, "FEW", 1)
    points = np.random.default_rng(seed).integers(0, 4, (5, 3))
    assert set(map(tuple, lattice.hull(points).tolist())) == brute(points)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(STRUCTURES), st.booleans())
def test_candidates_are_those_of_the_box(seed, matrix, coercive):
    """The same fixed point from the hull as from the box; and it holds the planted basis."""
    made = plant(Planting(n=3, half=3, size=7, matrix=matrix, coercive=coercive), generator(seed))
    p = made.polynomial
    found = lattice.possible(p)
    assert found == gram.consistent(p, gram.box(p))
    assert set(made.hidden) <= set(found)


def test_a_hundred_variables():
    made = plant(Planting(n=100, half=5, size=20), generator(0))
    p = made.polynomial
    assert gram.box(p) is None
    found = lattice.possible(p)
    assert set(made.hidden) <= set(found)
    assert len(found) <= len(made.hidden) + 2
    assert set(made.hidden) <= set(rules.corners(p))


def test_no_even_exponent_means_no_candidate():
    assert lattice.possible(polynomial("x*y + x^3")) == []


@pytest.mark.parametrize("matrix", ["dense", "lowrank"])
def test_corners_find_dense_bases(matrix):
    """What the fork's table says of dense and low-rank matrices; 6 variables, degree 12."""
    for seed in range(3):
        made = plant(Planting(n=6, half=6, size=30, matrix=matrix), generator(seed))
        p = made.polynomial
        assert set(rules.corners(p, lattice.possible(p))) == set(made.hidden)


def test_ranked_puts_what_occurs_first():
    p = polynomial("x^4 + x^2*y^2 + 2*x^2*y + y^2 + x^2 + 1")
    order = rules.ranked(p, gram.full(p))
    assert set(order[:5]) == {(2, 0), (1, 1), (0, 1), (1, 0), (0, 0)}
    assert order[5] == (0, 2)


def test_stages_grow_and_stop():
    p = plant(Planting(n=4, half=3, size=12, coercive=True), generator(2)).polynomial
    every = lattice.possible(p)
    for rho in (1.2, 1.5, 2.0):
        opening = rules.corners(p, every)
        sizes = [len(b) for b in staged.stages(p, [opening, opening], lambda: rules.ranked(p, every), every, rho)]
        assert sizes[0] == len(opening) and sizes.count(sizes[0]) == 1
        assert all(b >= rho * a for a, b in itertools.pairwise(sizes))
        assert rho * sizes[-1] <= len(every)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.2, 1.5, 2.0]), st.sampled_from([3.0, 5.0]))
def test_wrong_guesses_cost_no_more_than_the_bound(seed, rho, power):
    """Two random openings and a random ranking: what is asked before the complete basis stays within the bound."""
    rng = generator(seed)
    p = plant(Planting(n=4, half=3, size=9, coercive=True), rng).polynomial
    every = lattice.possible(p)
    guesses = [
        rules.repaired(p, [every[i] for i in rng.permutation(len(every))[: int(rng.integers(1, 20))]], every)
        for _ in range(2)
    ]
    ranking = [every[i] for i in rng.permutation(len(every))]
    cost = sum(len(b) ** power for b in staged.stages(p, guesses, lambda: ranking, every, rho)) + len(every) ** power
    assert cost <= staged.bound(2, rho, power) * len(every) ** power
