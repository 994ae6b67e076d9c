"""Planted polynomials: they are the squares they were made from, and are drawn as the published samplers draw."""

from fractions import Fraction

import numpy as np
import pytest

from luthier.errors import LuthierError
from luthier.kit import lattice
from luthier.kit.planted import STRUCTURES, Planting, generator, multiplied, plant, published, task
from luthier.kit.polynomial import polynomial

EVERY = [
    Planting(n=3, half=3, size=8, matrix=m, basis=b, coercive=c)
    for m in STRUCTURES
    for b in ("sparse_uniform", "clique")
    for c in (False, True)
]


def squares(made):
    """The polynomial from its factor, column by column, in fractions: independent of how it was multiplied."""
    total = {}
    for column in made.factor.T:
        linear = {tuple(b): Fraction(int(c), 10**made.digits) for b, c in zip(made.basis.tolist(), column, strict=True)}
        for a, x in linear.items():
            for b, y in linear.items():
                key = tuple(map(int.__add__, a, b))
                total[key] = total.get(key, 0) + x * y
    return total


@pytest.mark.parametrize("what", EVERY, ids=lambda w: f"{w.matrix}-{w.basis}-{w.coercive}")
def test_it_is_its_squares(what):
    made = plant(what, generator(5))
    assert made.polynomial == polynomial(squares(made))
    assert len(set(made.hidden)) == len(made.basis) == len(made.factor)
    assert made.factor.any(axis=1).all()
    assert made.basis.sum(axis=1).max() <= what.half


@pytest.mark.parametrize("matrix", STRUCTURES)
def test_coercive_ones_leave_nothing_to_exact_reduction(matrix):
    made = plant(Planting(n=3, half=2, size=6, matrix=matrix, coercive=True), generator(1))
    for pure in ((4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 0, 0)):
        assert dict(made.polynomial.terms)[pure] > 0
    assert len(lattice.possible(made.polynomial)) == 10


def test_the_same_key_gives_the_same_polynomial():
    first, again, other = (plant(EVERY[0], generator(k)).polynomial for k in (3, 3, 4))
    assert first == again != other


def test_by_hand():
    """(x^2 + 2 y)^2 + y^2 = x^4 + 4 x^2 y + 5 y^2, and what vanishes is left out."""
    basis, factor = np.array([[2, 0], [0, 1]]), np.array([[1, 0], [2, 1]])
    terms, coefficients = multiplied(basis, factor @ factor.T)
    found = dict(zip(map(tuple, terms.tolist()), coefficients.tolist(), strict=True))
    assert found == {(4, 0): 1, (2, 1): 4, (0, 2): 5}
    terms, coefficients = multiplied(np.array([[1, 0], [0, 1]]), np.eye(2, dtype=int))
    assert terms.tolist() == [[0, 2], [2, 0]]


def draws(what, count=300):
    return [plant(what, generator(seed)) for seed in range(count)]


def test_sizes_and_degrees_are_drawn_as_published():
    made = draws(Planting(n=4, half=3, size=12))
    sizes = [len(m.basis) for m in made]
    assert (min(sizes), max(sizes)) == (5, 18)  # 12 - 2 sqrt(12) = 5.07 and 12 + 2 sqrt(12) = 18.9, both cut
    assert abs(np.mean(sizes) - 11.5) < 0.7  # three deviations of the mean
    firsts = np.array([m.basis[0].sum() for m in made])  # in proportion to 4, 10, 20 monomials
    assert [int((firsts == d).sum()) for d in (0, 1)][0] == 0
    for degree, share in ((1, 4 / 34), (2, 10 / 34), (3, 20 / 34)):
        assert abs((firsts == degree).mean() - share) < 3 * (share * (1 - share) / 300) ** 0.5


def test_matrices_have_their_structure():
    ranks = {np.linalg.matrix_rank(m.factor) for m in draws(Planting(n=4, half=3, size=12, matrix="lowrank"), 80)}
    assert ranks == {1, 2, 3, 4, 5}
    dense = [m.factor for m in draws(Planting(n=4, half=3, size=12), 80)]
    assert abs(np.std(np.concatenate([f.ravel() for f in dense])) - 500) < 15  # 0.5 in thousandths
    sparse = [m.factor for m in draws(Planting(n=8, half=6, size=30, matrix="sparse"), 40)]
    assert 0.05 < np.mean([(f != 0).sum() / f.shape[1] ** 2 for f in sparse]) < 0.1
    for made in draws(Planting(n=4, half=3, size=16, matrix="block", block=3), 20):
        near = (made.factor @ made.factor.T) != 0
        assert (near.sum(axis=1) <= 3).all()


def test_the_constant_comes_only_where_it_is_asked_for():
    assert not any((m.basis.sum(axis=1) == 0).any() for m in draws(EVERY[0], 50))
    half = [(m.basis.sum(axis=1) == 0).any() for m in draws(Planting(n=3, half=3, size=8, least=0), 300)]
    assert abs(np.mean(half) - 0.5) < 0.09


def test_the_published_grid():
    grid = published()
    assert len(grid) == len(set(grid)) == 4 * (9 + 27 + 2) - 4 + 1  # n=8 with 30 monomials up to 6 stands twice
    assert {(w.n, w.half, w.size) for w in grid} >= {(6, 10, 60), (6, 20, 40), (8, 10, 30), (100, 5, 20), (20, 6, 30)}


def test_settings_by_name():
    assert task("n8-d6-m20-sparse") == Planting(n=8, half=3, size=20, matrix="sparse")
    assert task("n6-d20-m60-block-clique") == Planting(n=6, half=10, size=60, matrix="block", basis="clique")
    assert task("n100-d10-m20-block") in published()
    with pytest.raises(LuthierError, match="did you mean 'n8-d6-m20-sparse'"):
        task("n8-d6-m20-sparsee")
