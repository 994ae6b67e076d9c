"""CABS against a hand calculation, a slow twin in plain Python, and numbers from the released code."""

import random

import pytest
import torch

from luthier.engine.pieces import CHUNK
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.flows import Piece
from luthier.kit.context import Context
from luthier.merge.cabs import STRETCH, Cabs

FIRST = [8, -1, -16, 2, 0.5, -9, 4, 12, -30, 3, 7, 6, 1, -5, 14, -2]
SECOND = [-8.5, 3, 15, -6, 1, 10, -4, -2, 20, 7.5, 6.5, -1.5, 2.5, 5, -13, 9]


def merged(method, changes, name="w"):
    """changes: numbers; the merged change of one tensor."""
    base = torch.zeros(len(changes[0]))
    experts = [{name: torch.tensor(c, dtype=torch.float32)} for c in changes]
    return transform_tensors(method, {name: base}, experts, Context(step="golden"))[name].tolist()


def test_by_hand():
    """Two of four. The first keeps 8 and -16 of its first block; the second has 3 and -6 left, though 8.5 and 15 are
    larger. Of the second block the first keeps 12 and -9, the second 1 and -4."""
    made = merged(Cabs(density=0.5, block=4), [FIRST[:8], SECOND[:8]])
    assert made == [8, 3, -16, -6, 1, -9, -4, 12]
    back = merged(Cabs(density=0.5, block=4), [SECOND[:8], FIRST[:8]])
    assert back == [-8.5, -1, 15, 2, 0.5, 10, -4, 12]
    assert merged(Cabs(density=0.5, block=4, weights=(2.0, -1.0)), [FIRST[:8], SECOND[:8]]) == [
        16, -3, -32, 6, -1, -18, 4, 24,
    ]  # fmt: skip
    assert merged(Cabs(density=0.5, block=4, scale=0.5), [FIRST[:8], SECOND[:8]]) == [x / 2 for x in made]


# zongzhenyang/CABS a41f891, `sparse_task_vectors` of prune_task_vector_7b.py on FIRST and SECOND, both added; at 2:8
# `block_random_pruning` of prune_task_vector.py gives the same.
RELEASED = [
    (1, 4, [-8.5, 0, -16, 0, 0, 10, 0, 12, -30, 7.5, 0, 0, 0, 0, 14, 9]),
    (2, 8, [-8.5, 0, -16, 0, 0, 10, 0, 12, -30, 7.5, 0, 0, 0, 0, 14, 9]),
    (6, 8, [-0.5, 3, -1, -4, 1, 1, 4, 12, -10, 10.5, 13.5, 6, 2.5, -5, 1, 9]),
    (3, 4, [-0.5, 3, -1, 2, 1, 1, 0, 12, -10, 7.5, 13.5, 6, 2.5, -5, 1, 7]),
]


@pytest.mark.parametrize(("n", "m", "theirs"), RELEASED)
def test_equals_the_released_code(n, m, theirs):
    assert merged(Cabs(density=n / m, block=m), [FIRST, SECOND]) == theirs


def test_released_code_keeps_more_of_the_second():
    """The same run at 4:8: nothing of the second is pruned. Ours keeps the four that are free; at 5:8 one more."""
    theirs = [-0.5, 3, -1, -6, 1, 1, -4, 10, -10, 7.5, 13.5, 4.5, 2.5, 5, 1, 9]
    first = merged(Cabs(density=0.5, block=8), [FIRST])
    assert [t - f for t, f in zip(theirs, first, strict=True)] == SECOND
    second = [a - f for a, f in zip(merged(Cabs(density=0.5, block=8), [FIRST, SECOND]), first, strict=True)]
    assert [s for f, s in zip(first, second, strict=True) if f == 0] == [3, -6, 1, -4, 7.5, 2.5, 5, 9]
    assert not any(s for f, s in zip(first, second, strict=True) if f)
    more = merged(Cabs(density=0.625, block=8), [FIRST, SECOND])
    alone = merged(Cabs(density=0.625, block=8), [FIRST])
    assert sum(a != b for a, b in zip(more, alone, strict=True)) == 10


def test_released_code_drops_the_end():
    """Eleven entries at 2:8. One released function fails, the other leaves out the last three, as run; ours keeps of
    these three one an expert: a share of a quarter, but at least one."""
    theirs = [-8.5, 0, -16, 0, 0, 10, 0, 12, 0, 0, 0]
    ours = merged(Cabs(density=0.25, block=8), [FIRST[:11], SECOND[:11]])
    assert ours[:8] == theirs[:8] and ours[8:] == [-30, 7.5, 0]
    assert merged(Cabs(), [[1.0, -3.0, 2.0]]) == [0, -3, 0]  # smaller than a block


def test_the_default_is_64_of_256():
    row = [float(v) for v in range(1, 513)]
    kept = merged(Cabs(), [row])
    assert [i for i, v in enumerate(kept) if v] == [*range(192, 256), *range(448, 512)]
    assert merged(Cabs(), [row, row])[128:192] == row[128:192]


def test_of_equals_the_first_win():
    assert merged(Cabs(density=0.5, block=4), [[1, -1, 1, 1, 0, 2, 2, 2]]) == [1, -1, 0, 0, 0, 2, 2, 0]
    assert merged(Cabs(density=0.5, block=4), [[1, -1, 1, 1], [3, 3, 3, 3]]) == [1, -1, 3, 3]


def test_what_did_not_move_stays_free():
    """The first expert moved one entry of four and keeps two: the other one is the second's for the taking."""
    assert merged(Cabs(density=0.5, block=4), [[0, 0, 5, 0], [4, 3, 2, 1]]) == [4, 3, 5, 0]


def test_schedules_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    base, experts = {n: torch.zeros(4) for n in names}, [{n: row.clone() for n in names}]
    method = Cabs(density={"*": [0.0, 1.0], "lm_head*": 0.25}, block=4, scale=[3.0, 1.0], weights=({"*": 1.0},))
    made = [transform_tensors(method, base, experts, Context())[n].tolist() for n in names]
    assert made == [[0] * 4, [0, 0, 6, 8], [1, 2, 3, 4], [0, 0, 0, 4]]


def test_some_experts_only():
    """As a slice of layers may ask: the factor is the expert's own."""
    first, second = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    piece = Piece("w", "", (4,), None, 0, torch.zeros(4), (first, second), which=(0, 2))
    method = Cabs(density=0.25, block=4, weights=(2.0, 5.0, 3.0))
    assert method.partial and method.transform(piece, Context()).tolist() == [8, 0, 0, 12]


def twin(changes, density, block, weights):
    """Block by block, expert by expert, by sorting."""
    made, taken = [0.0] * len(changes[0]), set()
    for change, weight in zip(changes, weights, strict=True):
        for start in range(0, len(change), block):
            places = range(start, min(start + block, len(change)))
            ranked = sorted(places, key=lambda i: (i in taken, -abs(change[i]), i))
            for i in ranked[: max(1, int(density * len(places)))]:
                made[i] += weight * change[i]
                if change[i]:
                    taken.add(i)
    return made


@pytest.mark.parametrize(("density", "block"), [(0.25, 16), (0.5, 8), (0.3, 32), (0.7, 4), (0.01, 64), (1.0, 2)])
def test_equals_a_slow_twin(density, block):
    """Small whole numbers, so that magnitudes tie, zeros abound and sums are exact."""
    for seed in range(4):
        draw = random.Random(seed)
        changes = [[draw.randint(-6, 6) for _ in range(203)] for _ in range(4)]
        made = merged(Cabs(density=density, block=block, weights=(1.0, 2.0, 0.5, -1.0)), changes)
        assert made == twin(changes, density, block, (1.0, 2.0, 0.5, -1.0))


def test_experts_do_not_overlap_while_there_is_room():
    gen = torch.Generator().manual_seed(0)
    size = CHUNK + 3 * 64
    experts = [{"w": torch.rand(size, generator=gen) + 10.0**i} for i in range(4)]
    made = transform_tensors(Cabs(density=0.25, block=64), {"w": torch.zeros(size)}, experts, Context())["w"]
    by = [((made >= 10.0**i) & (made < 10.0**i + 1)).view(-1, 64).sum(1) for i in range(4)]
    assert all(torch.equal(b, torch.full_like(b, 16)) for b in by)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"block": 100}, "use a power of two"), ({"block": 2 * STRETCH}, "65,536"), ({"density": 1.1}, "up to 1.0")],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.cabs") as fault:
        Cabs(**fields)
    assert says in str(fault.value)
    assert STRETCH == CHUNK and Cabs(block=STRETCH)


def test_one_number_an_expert():
    with pytest.raises(LuthierError, match="weights: 2 numbers for 1 expert"):
        merged(Cabs(weights=(1.0, 1.0)), [FIRST])
