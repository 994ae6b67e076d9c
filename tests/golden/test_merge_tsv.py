"""TSV-Merge against hand calculations, a slow twin by SVDs in numpy, and numbers from the released code."""

import math

import numpy as np
import pytest
import torch

from luthier.engine.stream import transform_tensors
from luthier.flows import Piece
from luthier.kit.context import Context
from luthier.merge.tsv import Tsv


def merged(method, changes, name="w", base=None):
    """The merged change of one tensor, as a list."""
    base = torch.zeros(np.shape(changes[0])) if base is None else base
    experts = [{name: base + torch.as_tensor(np.array(c), dtype=torch.float32)} for c in changes]
    return (transform_tensors(method, {name: base}, experts, Context(step="golden"))[name] - base).tolist()


def twin(changes, count):
    """Truncated SVDs side by side, both sides made orthonormal by a further SVD; doubles throughout."""
    parts = [np.linalg.svd(np.array(c, dtype=float), full_matrices=False) for c in changes]
    U = np.concatenate([u[:, :count] for u, _, _ in parts], 1)
    s = np.concatenate([s[:count] for _, s, _ in parts])
    V = np.concatenate([v[:count] for _, _, v in parts], 0)
    U, V = (a @ b for a, _, b in (np.linalg.svd(x, full_matrices=False) for x in (U, V)))
    return U @ np.diag(s) @ V


def random(shape, count, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape).astype(np.float32) for _ in range(count)]


def test_by_hand():
    """Directions at 0 and 60 degrees have a bisector at 30; the nearest right angle around it lies at -15 and 75."""
    a = np.array([math.cos(math.pi / 3), math.sin(math.pi / 3)])
    first, second = np.diag([4.0, 1.0]), 2 * np.outer(a, a)
    p, q = (np.array([math.cos(math.radians(d)), math.sin(math.radians(d))]) for d in (-15, 75))
    right = 4 * np.outer(p, p) + 2 * np.outer(q, q)
    np.testing.assert_allclose(merged(Tsv(), [first, second]), right, atol=1e-6)
    np.testing.assert_allclose(merged(Tsv(scale=-0.5), [first, second]), -0.5 * right, atol=1e-6)


def test_what_is_no_matrix_is_averaged():
    assert merged(Tsv(), [[1.0, 2.0, 6.0], [3.0, -2.0, 0.0]]) == [2.0, 0.0, 3.0]
    assert merged(Tsv(scale=2.0), [[1.0, 2.0, 6.0], [3.0, -2.0, 0.0]]) == [4.0, 0.0, 6.0]
    blocks = random((2, 3, 4), 2)
    np.testing.assert_allclose(merged(Tsv(), blocks), (blocks[0] + blocks[1]) / 2, atol=1e-6)


# AntoAndGar/task_singular_vectors a6c9718, `compute_and_sum_svd_mem_reduction` run in doubles on these changes.
RELEASED = [
    (
        [[[-7, -3, -5, 0], [-2, 6, -9, -8], [-6, 1, 7, 1]], [[-8, 7, 6, 2], [-9, 8, -5, 7], [-9, 6, -3, 0]]],
        [
            [-7.2839597, 6.1325918, -1.7435231, 2.3276041],
            [-7.5428938, 8.3855449, -9.6651637, -3.0592107],
            [-10.6183255, 6.5430616, 6.7157419, 9.8353515],
        ],
    ),
    (
        [
            [[-8, 0, -5], [5, 2, -6], [5, 6, -9], [7, 4, 9]],
            [[2, 8, 4], [3, -4, -8], [-6, -6, 3], [-5, -6, -4]],
            [[7, 6, -5], [3, 7, -1], [9, -4, 3], [-7, -8, 9]],
        ],
        [
            [1.5730251, 9.8378267, -3.4102056],
            [12.4757707, -4.683178, -10.3901719],
            [-11.8505791, -4.184209, -9.0778149],
            [-2.2149242, -9.8708452, 7.6782227],
        ],
    ),
    (
        [
            [[-6, -9, -1, -2], [-2, -5, -6, 8], [-7, 9, 4, -8], [-9, -7, -3, -2]],
            [[7, -9, 8, -3], [8, 4, -2, 5], [9, -1, -9, -4], [4, 1, -1, -5]],
        ],
        [
            [3.7604455, -12.2533774, 5.1717028, -5.065128],
            [8.0713154, -6.6242631, -11.5785166, 5.1480699],
            [6.0206449, 6.777959, -2.8998584, -13.4060358],
            [-11.1021271, -6.7898103, -8.3163751, -4.0727288],
        ],
    ),
]


@pytest.mark.parametrize(("changes", "theirs"), RELEASED)
def test_equals_the_released_code(changes, theirs):
    np.testing.assert_allclose(merged(Tsv(), changes), theirs, rtol=2e-6)


@pytest.mark.parametrize(("shape", "experts"), [((40, 40), 2), ((33, 64), 3), ((64, 33), 3), ((7, 90), 5)])
def test_equals_a_slow_twin(shape, experts):
    changes = random(shape, experts)
    np.testing.assert_allclose(merged(Tsv(), changes), twin(changes, min(shape) // experts), atol=3e-6)


def test_a_steep_spectrum_keeps_its_digits():
    """Singular values over four decades: the Gram matrix holds their squares, and doubles hold those."""
    draw = np.random.default_rng(1)
    turns = [[np.linalg.qr(draw.standard_normal((24, 24)))[0] for _ in "UV"] for _ in range(2)]
    changes = [(U * np.logspace(0, -4, 24)) @ V for U, V in turns]
    small = (Tsv(share=0.5), 12)
    np.testing.assert_allclose(merged(small[0], changes), twin(changes, small[1]), atol=2e-6)


def test_share_says_how_many_directions():
    """Rounded down but at least one; 0 leaves the base; above 1/T both sides have more columns than rows."""
    changes = random((12, 20), 2)
    for share, count in [(0.01, 1), (0.25, 3), (0.32, 3), (0.5, 6), (0.75, 9), (1.0, 12)]:
        np.testing.assert_allclose(merged(Tsv(share=share), changes), twin(changes, count), atol=3e-6)
    assert not np.any(merged(Tsv(share=0.0), changes))
    np.testing.assert_allclose(merged(Tsv(), random((2, 5), 3)), merged(Tsv(share=0.5), random((2, 5), 3)), atol=1e-6)


def test_some_experts_only():
    """As a slice of layers may ask: the others are not there."""
    changes = random((6, 8), 2)
    piece = Piece("w", "", (6, 8), None, 0, torch.zeros(6, 8), tuple(map(torch.tensor, changes)), which=(0, 2))
    assert Tsv.partial and Tsv().transform(piece, Context()).tolist() == merged(Tsv(), changes)


def test_schedules_by_depth_and_name():
    changes, base = random((6, 6), 2), torch.zeros(6, 6)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    method = Tsv(scale=[0.0, 2.0], share={"*": [0.0, 1.0], "lm_head*": 0.5})
    experts = [{n: torch.tensor(c) for n in names} for c in changes]
    made = transform_tensors(method, dict.fromkeys(names, base), experts, Context())
    right = [0 * changes[0], twin(changes, 3), 2 * twin(changes, 6), 2 * twin(changes, 3)]
    for name, value in zip(names, right, strict=True):
        np.testing.assert_allclose(made[name].numpy(), value, atol=3e-6)


def test_an_expert_that_did_not_move_takes_no_room():
    """It has no directions; the others keep their 1/T."""
    changes = random((9, 9), 2)
    still = [*changes, np.zeros((9, 9))]
    np.testing.assert_allclose(merged(Tsv(), still), twin(changes, 3), atol=3e-6)
    assert not np.any(merged(Tsv(), [np.zeros((4, 5))] * 2))


def rank_one(seed):
    u, v = np.random.default_rng(seed).standard_normal((2, 8)).astype(np.float32)
    return np.outer(u, v)


def test_released_code_fills_low_ranks_with_noise():
    """Two changes of rank one on orthogonal directions do not interfere, so their sum is the merge. The released
    code fills the other places of each share with whatever vectors the SVD gives for the value zero."""
    first, second = np.zeros((8, 8)), np.zeros((8, 8))
    first[:4, :4], second[4:, 4:] = rank_one(1)[:4, :4], rank_one(2)[:4, :4]
    np.testing.assert_allclose(merged(Tsv(), [first, second]), first + second, atol=1e-6)
    # 2 e0e1' and e2e3' in four dimensions, run as above: every entry they share out is wrong
    theirs = [[2**0.5, 2**0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.5**0.5], [0, 0, 0, 0.5**0.5]]
    axes = np.zeros((2, 4, 4))
    axes[0, 0, 1], axes[1, 2, 3] = 2, 1
    np.testing.assert_allclose(merged(Tsv(), axes), axes.sum(0), atol=1e-7)
    assert np.abs(theirs - axes.sum(0)).max() > 0.5


def test_released_code_invents_where_experts_agree():
    """Twice the same change of rank one is that change. The released code adds one as large in a direction nobody
    went: of the orthonormal pairs around one vector it takes any."""
    change = np.zeros((4, 4))
    change[0, 1] = 2
    theirs = np.zeros((4, 4))
    theirs[0, 1] = theirs[1, 0] = 2  # run as above
    np.testing.assert_allclose(merged(Tsv(), [change, change]), change, atol=1e-7)
    assert np.abs(theirs - change).max() == 2
    one = rank_one(3)
    np.testing.assert_allclose(merged(Tsv(), [one, one]), one, atol=1e-6)


def test_rounding_is_not_a_direction():
    """A change of rank two, told apart from a base of size one in fp32, is merged like the change itself."""
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    changes = [1e-2 * (np.outer(*random((2, 64), 1, s)[0]) + np.outer(*random((2, 64), 1, s + 9)[0])) for s in (1, 2)]
    exact = np.array(merged(Tsv(), changes))
    rounded = np.array(merged(Tsv(), changes, base=base))
    assert np.abs(exact - rounded).max() < 1e-5 < np.abs(exact).max() / 1e3


def test_what_a_plan_counts():
    """In decompositions of one matrix, as `benchmarks/plan.py` measures them: more with each expert."""
    assert [Tsv().cubic(experts) for experts in (1, 3, 8)] == [2.5, 3.5, 6.0]
