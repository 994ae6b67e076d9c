"""Counter-based randomness: any split of a range is the range, shares are exact, streams are independent."""

import math
import os
import random

import numpy as np
import pytest
import torch

from luthier.kit.compiled import LEAST, kernels, worth
from luthier.kit.noise import ALL, SECOND, STEP, Draws, below, bound, bounds_of, drawn, words

KEY = 0x0123456789ABCDEF


def test_words_by_the_book():
    """Sixteen words a counter step, lowest bits first: the same as Philox walked from the start."""
    raw = np.random.Philox(key=KEY, counter=0).random_raw(12).tolist()
    slow = [(r >> shift) & 0xFFFF for r in raw for shift in (0, 16, 32, 48)]
    assert words(KEY, 0, 48).tolist() == slow
    assert STEP == 16 and words(KEY, 16, 16).tolist() == slow[16:32]


@pytest.mark.parametrize("seed", range(8))
def test_any_split_is_the_range(seed):
    """Starts and lengths that are multiples of nothing."""
    draw = random.Random(seed)
    start, count = draw.randrange(10**6), draw.randrange(1, 3000)
    whole, share = words(KEY, start, count), below(KEY, start, count, bound(0.3))
    cuts = sorted({0, count, *(draw.randrange(count + 1) for _ in range(20))})
    pairs = list(zip(cuts, cuts[1:], strict=False))
    assert np.array_equal(np.concatenate([words(KEY, start + a, b - a) for a, b in pairs]), whole)
    assert np.array_equal(np.concatenate([below(KEY, start + a, b - a, bound(0.3)) for a, b in pairs]), share)


def test_far_places():
    """Beyond 2**32 entries: tensors that large exist."""
    far = (1 << 40) + 7
    assert np.array_equal(words(KEY, far, 40)[13:], words(KEY, far + 13, 27))
    assert not np.array_equal(words(KEY, far, 40), words(KEY, 7, 40))


def test_kernels_give_the_same_words():
    places = [0, 5, STEP, 12345, (1 << 40) + 7]
    keys = [0, KEY, KEY | SECOND, (1 << 64) - 1]
    plain = [words(key, start, 100).tolist() for key in keys for start in places]
    with worth(LEAST, 1, torch.device("cpu")):
        assert kernels() is not None
        assert [words(key, start, 100).tolist() for key in keys for start in places] == plain
        assert words(KEY, 3, 0).size == 0


def test_nothing_asked_nothing_given():
    assert words(KEY, 5, 0).size == 0 and below(KEY, 5, 0, bound(0.5)).size == 0


def test_keys_give_other_words():
    """Neighbouring keys and places agree as often as chance: one word in 65,536."""
    size = 1 << 18
    one = words(KEY, 0, size)
    for other in (words(KEY + 1, 0, size), words(KEY ^ (1 << 62), 0, size), words(KEY, 1, size)):
        assert (one == other).sum() < 4 + 6 * math.sqrt(4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1 / 3, 0.001])
def test_shares_are_met(share):
    """Within five standard deviations of the binomial, in total and for every place within a counter step."""
    size = 1 << 19
    found = below(KEY, 3, size, bound(share))
    for part in [found, *found.reshape(-1, STEP).T]:
        spread = math.sqrt(part.size * share * (1 - share))
        assert abs(int(part.sum()) - part.size * share) < 5 * spread


def test_words_are_uniform():
    """Chi-square over the upper and the lower byte, and over pairs of neighbours' upper four bits."""
    drawn = words(KEY, 11, 1 << 20).astype(np.int64)
    pairs = (drawn[:-1] >> 12) << 4 | drawn[1:] >> 12
    for values in (drawn >> 8, drawn & 255, pairs):
        counts = np.bincount(values, minlength=256)
        expected = values.size / 256
        chi = ((counts - expected) ** 2 / expected).sum()
        assert 255 - 5 * math.sqrt(510) < chi < 255 + 5 * math.sqrt(510)


def test_ends():
    assert below(KEY, 0, 100, ALL).all() and not below(KEY, 0, 100, 0).any()
    assert bound(1.0) == ALL and bound(0.0) == 0 and bound(0.5) == ALL // 2


def test_the_second_stream_decides_where_the_first_is_even():
    """A bound of upper + half: of entries that draw exactly `upper`, the second stream keeps half."""
    size = 1 << 22
    every = words(KEY, 0, size)
    upper = 1234
    even = np.flatnonzero(every == upper)
    assert 30 < even.size < 110  # 64 expected
    for lower in (0, 1 << 15, 0xFFFF):
        found = below(KEY, 0, size, upper << 16 | lower)
        assert np.array_equal(np.delete(found, even), np.delete(every < upper, even))
        second = [int(words(KEY | 1 << 64, int(at), 1)[0]) < lower for at in even]
        assert found[even].tolist() == second
    assert 0.25 < np.mean(below(KEY, 0, size, upper << 16 | 1 << 15)[even]) < 0.75


def test_a_bound_for_every_entry():
    """The same as one bound at a time."""
    bounds = np.array([bound(s) for s in (0.0, 0.2, 0.5, 0.8)] * 50, dtype=np.uint32)
    found = below(KEY, 9, 200, bounds)
    for b in set(bounds.tolist()):
        assert np.array_equal(found[bounds == b], below(KEY, 9, 200, b)[bounds == b])


def test_the_last_bound_is_certain():
    """Some of 2**18 entries draw the largest word, and of these none is lost."""
    size = 1 << 18
    assert (words(KEY, 0, size) == 0xFFFF).any()
    assert bounds_of(np.array([0.0, -1e-12, 0.5, 1.0])).tolist() == [0, 0, 1 << 31, ALL - 1]
    assert below(KEY, 0, size, bounds_of(np.ones(size))).all()
    assert not below(KEY, 0, size, bounds_of(np.zeros(size))).any()


def test_a_larger_share_keeps_what_a_smaller_one_keeps():
    few, many = below(KEY, 0, 10000, bound(0.2)), below(KEY, 0, 10000, bound(0.21))
    assert not (few & ~many).any() and (many & ~few).any()


def test_a_share_follows_the_places():
    assert np.array_equal(drawn(KEY, 50, 100, 0.4), below(KEY, 50, 100, bound(0.4)))
    assert drawn(KEY, 0, 9, 1.0) is None


def test_what_was_drawn_is_kept(tmp_path):
    """The second pass reads what the first one drew, in any order, whatever key it is given; the file has no name."""
    draws = Draws({"a": (1000, 2), "b": (21, 3)}, tmp_path)
    stretches = [("a", 0, 512), ("a", 512, 488), ("b", 0, 21)]
    first = {
        (name, change, start): draws.found(name, change, KEY + change, start, count, 0.4)
        for name, start, count in stretches for change in range(2 if name == "a" else 3)
    }  # fmt: skip
    for (_, change, start), found in first.items():
        assert np.array_equal(found, drawn(KEY + change, start, found.size, 0.4))
    draws.seal()
    for (name, change, start), found in reversed(first.items()):
        assert np.array_equal(draws.found(name, change, 0, start, found.size, 0.4), found)
    assert draws.found("b", 1, 0, 0, 21, 1.0) is None
    assert not list(tmp_path.iterdir())


def test_of_one_pass_nothing_is_kept():
    draws = Draws({"a": (64, 1)}, None, several=False)
    draws.seal()
    assert np.array_equal(draws.found("a", 0, KEY, 0, 64, 0.5), drawn(KEY, 0, 64, 0.5))


def test_room_for_what_is_drawn_is_claimed_at_once(tmp_path):
    draws = Draws({"a": (80_001, 2), "b": (7, 3)}, tmp_path)
    assert os.fstat(draws._file.fileno()).st_size == 2 * 10_001 + 3
    with pytest.raises(OSError):
        Draws({"a": (1 << 56, 9)}, tmp_path)
