"""Order statistics of rows at hand, against full sorts."""

import math

import pytest
import torch

from luthier.kit.select import between, keep_, row_band, row_ranks


def magnitudes(rows, columns, seed=0):
    """Whole numbers, so that equal ones abound."""
    return torch.randint(0, 6, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (64, 33), (2, 1025)])
def test_bands_are_those_of_a_sort(rows, columns):
    for given in (magnitudes(rows, columns), torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))):
        before = given.clone()
        ranked = given.sort(descending=True).values
        for first, last in {(1, 1), (1, columns), (columns, columns), (1 + columns // 3, 1 + columns // 2)}:
            low, high = row_band(given, first, last)
            assert torch.equal(low, ranked[:, last - 1 : last]) and torch.equal(high, ranked[:, first - 1 : first])
        assert torch.equal(given, before)


def test_no_band_holds_nothing():
    assert [b.tolist() for b in row_band(torch.ones(2, 3), 0, 0)] == [[[math.inf]] * 2] * 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (64, 33), (2, 70000)])
def test_ranks_are_those_of_a_stable_sort(rows, columns):
    for given in (magnitudes(rows, columns), torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))):
        before = given.clone()
        assert torch.equal(row_ranks(given), given.argsort(dim=1, stable=True).argsort(dim=1))
        assert torch.equal(given, before)


def test_ranks_by_hand():
    assert row_ranks(torch.tensor([[3.0, 0.0, 3.0, 1e-45, 1e38]])).tolist() == [[2, 0, 3, 1, 4]]


def test_keeping_is_in_place():
    values = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert keep_(values, torch.tensor([[True, False], [False, True]])) is values
    assert values.tolist() == [[1.0, 0.0], [0.0, -4.0]]
    assert keep_(values, torch.tensor([False, True, True, True])).tolist() == [[0.0, 0.0], [0.0, -4.0]]


def test_between_by_numbers_and_by_columns():
    given = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert between(given, 1.0, 3.0).tolist() == [[False, True, True], [True, False, False]]
    low, high = torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [math.inf]])
    assert between(given, low, high).tolist() == [[False, True, False], [False, True, True]]
    third = torch.tensor([1 / 3])
    assert between(third, float(third), float(third)).all()
