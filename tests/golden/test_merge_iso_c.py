"""Iso-C and Iso-CTS against hand calculations, a slow twin by SVDs in numpy, and numbers from the released code."""

import numpy as np
import pytest
import torch

from luthier.engine.stream import transform_tensors
from luthier.flows import Piece
from luthier.kit.context import Context
from luthier.merge.iso_c import IsoC


def merged(method, changes, name="w", base=None):
    """The merged change of one tensor, as a list."""
    base = torch.zeros(np.shape(changes[0])) if base is None else base
    experts = [{name: base + torch.as_tensor(np.array(c), dtype=torch.float32)} for c in changes]
    return (transform_tensors(method, {name: base}, experts, Context(step="golden"))[name] - base).tolist()


def twin(changes, common=None, own=0):
    """By SVDs, the orthonormal sets by further ones; doubles throughout. common: directions of the sum."""
    changes = [np.array(c, dtype=float) for c in changes]
    U, s, V = np.linalg.svd(sum(changes), full_matrices=False)
    if own:
        shared = U[:, :common]
        each = [np.linalg.svd(c - shared @ shared.T @ c, full_matrices=False) for c in changes]
        U = np.concatenate([shared, *(u[:, :own] for u, _, _ in each)], 1)
        s = np.concatenate([s[:common], *(s[:own] for _, s, _ in each)])
        V = np.concatenate([V[:common], *(v[:own] for _, _, v in each)], 0)
        U, V = (a @ b for a, _, b in (np.linalg.svd(x, full_matrices=False) for x in (U, V)))
    return s.mean() * U @ V


def random(shape, count, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape).astype(np.float32) for _ in range(count)]


def test_by_hand():
    """The sum has singular values 5 and 1 on the axes, with a sign and a swap: each becomes 3."""
    first, second = [[0.0, 3.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]
    np.testing.assert_allclose(merged(IsoC(), [first, second]), [[0, 3], [-3, 0]], atol=1e-6)
    np.testing.assert_allclose(merged(IsoC(scale=0.5), [first, second]), [[0, 1.5], [-1.5, 0]], atol=1e-6)


def test_a_turned_change_stays_as_it_is():
    """A multiple of an orthogonal matrix has equal singular values already."""
    turn = 0.7 * np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    np.testing.assert_allclose(merged(IsoC(), [turn]), turn, atol=1e-6)


def test_what_is_no_matrix_is_averaged():
    assert merged(IsoC(), [[1.0, 2.0, 6.0], [3.0, -2.0, 0.0]]) == [2.0, 0.0, 3.0]
    assert merged(IsoC(scale=2.0), [[1.0, 2.0, 6.0], [3.0, -2.0, 0.0]]) == [4.0, 0.0, 6.0]
    blocks = random((2, 3, 4), 2)
    np.testing.assert_allclose(merged(IsoC(), blocks), (blocks[0] + blocks[1]) / 2, atol=1e-6)


WIDE = [[[-7, -3, -5, 0], [-2, 6, -9, -8], [-6, 1, 7, 1]], [[-8, 7, 6, 2], [-9, 8, -5, 7], [-9, 6, -3, 0]]]
TALL = [
    [[-8, 0, -5], [5, 2, -6], [5, 6, -9], [7, 4, 9]],
    [[2, 8, 4], [3, -4, -8], [-6, -6, 3], [-5, -6, -4]],
    [[7, 6, -5], [3, 7, -1], [9, -4, 3], [-7, -8, 9]],
]
SQUARE = [
    [[-6, -9, -1, -2], [-2, -5, -6, 8], [-7, 9, 4, -8], [-9, -7, -3, -2]],
    [[7, -9, 8, -3], [8, 4, -2, 5], [9, -1, -9, -4], [4, 1, -1, -5]],
]
# danielm1405/iso-merging d34010a, `iso_c` and `iso_cts` run in doubles on these changes.
RELEASED = [
    (
        WIDE,
        1.0,
        [
            [-13.1020777, -6.5252831, -1.9769382, 4.7470618],
            [-3.4823513, 9.4960215, -11.6775425, -1.4214242],
            [-6.8737689, 9.5133747, 9.9967517, -1.7316459],
        ],
    ),
    (
        WIDE,
        0.5,
        [
            [-6.9347274, 9.1198107, 9.5924667, -7.4413122],
            [-5.9847242, 7.566074, -13.4046353, -2.4296689],
            [-11.6508701, -1.6391049, 2.166445, 11.641607],
        ],
    ),
    (
        TALL,
        1.0,
        [
            [3.1943469, 14.5286081, 3.1932074],
            [7.5388872, -0.170508, -9.1218283],
            [12.6097413, -2.8841338, 2.3951914],
            [2.4600182, -3.5592391, 11.5305971],
        ],
    ),
    (
        TALL,
        0.5,
        [
            [0.7468467, 10.2964138, -2.938383],
            [11.2213455, -6.0514879, -9.8263534],
            [-11.6530501, -4.2713756, -10.2905164],
            [-1.0315695, -10.1218968, 7.2282808],
        ],
    ),
    (
        SQUARE,
        0.5,
        [
            [8.326531, -13.8110434, 5.0938293, -4.4781908],
            [5.3617696, -4.6201788, -11.6561099, 10.9598269],
            [7.1941632, 4.6162415, -9.6451459, -11.8314336],
            [-12.4996662, -8.5250613, -7.1579672, -5.0914153],
        ],
    ),
    (
        SQUARE,
        0.75,
        [
            [5.3516091, -12.17145, 4.5344445, -4.0324288],
            [7.14006, -3.0342374, -9.4374741, 8.022008],
            [7.1078834, 4.7193826, -5.2044708, -10.6641684],
            [-9.1358306, -5.8294271, -8.7688062, -4.389533],
        ],
    ),
]


@pytest.mark.parametrize(("changes", "common", "theirs"), RELEASED)
def test_equals_the_released_code(changes, common, theirs):
    np.testing.assert_allclose(merged(IsoC(common=common), changes), theirs, rtol=3e-6)


@pytest.mark.parametrize("shape", [(30, 30), (20, 45), (45, 20)])
def test_equals_a_slow_twin(shape):
    changes = random(shape, 3)
    np.testing.assert_allclose(merged(IsoC(), changes), twin(changes), atol=2e-5)
    short = min(shape)
    for common in (0.8, 0.3):
        own = round((short - int(short * common)) / 3)
        right = twin(changes, short - 3 * own, own)
        np.testing.assert_allclose(merged(IsoC(common=common), changes), right, atol=2e-5)
    alone = twin(changes[:1], short - round(short / 2), round(short / 2))
    np.testing.assert_allclose(merged(IsoC(common=0.5), changes[:1]), alone, atol=2e-5)


def test_a_steep_spectrum_keeps_its_digits():
    """The weakest direction, a ten-thousandth of the strongest, counts in full."""
    draw = np.random.default_rng(1)
    U, V = (np.linalg.qr(draw.standard_normal((24, 24)))[0] for _ in "UV")
    sigma = np.logspace(0, -4, 24)
    made = np.array(merged(IsoC(), [(U * sigma) @ V]))
    np.testing.assert_allclose(made, sigma.mean() * U @ V, atol=2e-4 * sigma.mean())  # fp32 inputs: 1e-7 over 1e-4


def test_common_may_be_as_small_as_it_likes():
    """Seven directions, three experts: two each and the one that is left, where the released code breaks off."""
    changes = random((7, 9), 3)
    np.testing.assert_allclose(merged(IsoC(common=0.0), changes), twin(changes, 1, 2), atol=1e-5)
    changes = random((3, 4), 2)
    np.testing.assert_allclose(merged(IsoC(common=0.25), changes), twin(changes, 1, 1), atol=1e-5)


def test_some_experts_only():
    """As a slice of layers may ask: the others are not there."""
    changes = random((6, 8), 2)
    piece = Piece("w", "", (6, 8), None, 0, torch.zeros(6, 8), tuple(map(torch.tensor, changes)), which=(0, 2))
    assert IsoC.partial and IsoC().transform(piece, Context()).tolist() == merged(IsoC(), changes)


def test_schedules_by_depth_and_name():
    changes, base = random((6, 8), 2), torch.zeros(6, 8)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    method = IsoC(scale=[0.0, 2.0], common={"*": [0.0, 1.0], "lm_head*": 0.67})
    experts = [{n: torch.tensor(c) for n in names} for c in changes]
    made = transform_tensors(method, dict.fromkeys(names, base), experts, Context())
    right = [0 * changes[0], twin(changes, 2, 2), 2 * twin(changes), 2 * twin(changes, 4, 1)]
    for name, value in zip(names, right, strict=True):
        np.testing.assert_allclose(made[name].numpy(), value, atol=1e-5)


def test_released_code_fills_low_ranks_with_noise():
    """Of rank one, 2 e0e1' is even already. The released code, run on it, makes it a fourth as large and adds three
    equals on other axes, one of them with a sign."""
    change = np.zeros((4, 4))
    change[0, 1] = 2
    theirs = [[0, 0.5, 0, 0], [-0.5, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.5]]
    np.testing.assert_allclose(merged(IsoC(), [change]), change, atol=1e-7)
    assert np.abs(theirs - change).max() == 1.5
    u, v = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    low = np.outer(u, v)
    np.testing.assert_allclose(merged(IsoC(), [low, low]), 2 * low, atol=1e-5)
    np.testing.assert_allclose(merged(IsoC(common=0.5), [low, low]), 2 * low, atol=1e-5)
    assert not np.any(merged(IsoC(), [np.zeros((4, 5))] * 2))


@pytest.mark.parametrize(("common", "cost"), [(1.0, 1.0), (0.8, 4.0), ({"*": 0.8}, 4.0)])
def test_what_a_plan_counts(common, cost):
    """Iso-C decomposes one matrix, the sum; Iso-CTS each of three experts' rest as well."""
    assert IsoC(common=common).cubic(3) == cost
