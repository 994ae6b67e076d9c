"""Model Stock against hand calculation, a slow twin in doubles, and numbers from mergekit 0.1.5 and fusion-bench."""

import itertools
import math
import random

import pytest
import torch

from luthier.engine.stream import transform_tensors
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.model_stock import ModelStock

BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [[8, -1, -16, 2, 0, -9, 4, 12], [5, 3, -11, -6, 1, -10, -4, 9], [7, -2, -3, 4, -5, -12, 11, 13]]


def merged(method, base, experts, shape=(-1,)):
    view = lambda values: {"w": torch.tensor(values, dtype=torch.float32).view(shape)}  # noqa: E731
    made = transform_tensors(method, view(base), [view(e) for e in experts], Context(step="golden"))["w"]
    return made.flatten().tolist()


def experts(count, by=64):
    return [[b + m / by for b, m in zip(BASE, row, strict=True)] for row in MOVED[:count]]


def test_two_by_hand():
    """Changes (1, 0) and (1, 1) are 45 degrees apart: t = 2c / (1 + c), of the mean change (1, 1/2)."""
    c = math.sqrt(0.5)
    t = 2 * c / (1 + c)
    assert merged(ModelStock(), [5.0, 7.0], [[6.0, 7.0], [6.0, 8.0]]) == pytest.approx([5 + t, 7 + t / 2], rel=1e-6)


def test_three_by_hand():
    """Three unit changes, every two at 60 degrees: t = 3/2 / (1 + 2/2) = 3/4, whatever is averaged."""
    far = [[1.0, 0.0, 0.0], [0.5, math.sqrt(3) / 2, 0.0], [0.5, math.sqrt(3) / 6, math.sqrt(2 / 3)]]
    mean = [sum(column) / 3 for column in zip(*far, strict=True)]
    for average in ("cosine", "angle"):
        assert merged(ModelStock(average=average), [0.0] * 3, far) == pytest.approx([0.75 * m for m in mean], abs=1e-6)


def test_the_geometry_of_the_paper():
    """A centre c from which experts and base are seen at right angles to one another: (one - c) . (other - c) = 0 and
    c . (one - c) = 0, so c . one = |c|^2 = one . other. The result is c's shadow on the plane of the two."""
    one, other = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([2.0, -1.0, 1.0, 2.0])
    other = other * one.norm() / other.norm()
    made = torch.tensor(merged(ModelStock(), [0.0] * 4, [one.tolist(), other.tolist()]))
    assert float(made @ one) == pytest.approx(float(one @ other), rel=1e-5)
    assert float(made @ other) == pytest.approx(float(one @ other), rel=1e-5)


# mergekit 0.1.5, `merge_tensors([base, *experts], "model_stock", base_index=0)` in fp32 on 2 x 4 matrices.
MERGEKIT = [
    (False, 2, [0.59128654, -0.235955909, 0.810404837, -0.028088173, -0.992977977, 0.616581202, 0.125, -0.352537096]),
    (False, 3, [0.590711951, -0.25, 0.863932133, 0.0, -1.018142462, 0.609396577, 0.174891531, -0.34578976]),
    (True, 2, [0.590699196, -0.23604627, 0.811624706, -0.027907453, -0.992898524, 0.615071833, 0.125, -0.350868851]),
    (True, 3, [0.585953295, -0.25, 0.871070087, 0.0, -1.019177675, 0.601373374, 0.177738488, -0.336990088]),
]


@pytest.mark.parametrize(("filter_wise", "count", "theirs"), MERGEKIT)
def test_mergekits_numbers(filter_wise, count, theirs):
    made = merged(ModelStock(filter_wise=filter_wise), BASE, experts(count), (2, 4))
    assert made == pytest.approx(theirs, abs=1e-6)


def test_fusion_benchs_numbers():
    """fusion-bench 54c9e8c, `compute_angle` of all pairs, their mean, `compute_ratio` with k = 3, and the sum."""
    theirs = [0.591372371, -0.25, 0.862941563, 0.0, -1.018274546, 0.608372986, 0.175254777, -0.344667077]
    assert merged(ModelStock(average="angle"), BASE, experts(3)) == pytest.approx(theirs, abs=1e-6)
    assert merged(ModelStock(), BASE, experts(3)) != pytest.approx(theirs, abs=1e-4)


def test_mergekit_holds_back_short_changes():
    """t does not depend on how long the changes are: 0.8988 here. mergekit's is 0.8988 at norms of a third and
    0.1710 at norms of 3.7e-4 and 3.1e-4, where it divides by 1e-6 instead of their product, 1.1e-7."""
    for by in (64, 64_000):
        far = [[m / by for m in row] for row in MOVED[:2]]
        made = merged(ModelStock(), [0.0] * 8, far)
        assert made[0] / ((far[0][0] + far[1][0]) / 2) == pytest.approx(0.8988215, rel=1e-6)
    one, other = (torch.tensor(row) for row in far)
    cosine = float(one @ other) / max(float(one.norm() * other.norm()), 1e-6)
    assert 2 * cosine / (1 + cosine) == pytest.approx(0.17102, rel=1e-4)


def twin(base, models, rows, filter_wise, average):
    """Entry by entry in doubles. base, models: flat lists."""
    width = len(base) // rows if filter_wise else len(base)
    made = []
    for at in range(0, len(base), width):
        part = base[at : at + width]
        far = [[x - b for x, b in zip(m[at : at + width], part, strict=True)] for m in models]
        pairs = []
        for u, v in itertools.combinations(far, 2):
            lengths = math.hypot(*u) * math.hypot(*v)
            pairs.append(math.fsum(a * b for a, b in zip(u, v, strict=True)) / lengths if lengths else 0.0)
        if average == "cosine":
            mean = sum(pairs) / len(pairs)
        else:
            mean = math.cos(sum(math.acos(max(-1, min(1, c))) for c in pairs) / len(pairs))
        count = len(models)
        t = count * mean / (1 + (count - 1) * mean)
        made += [b + t * sum(column) / count for b, *column in zip(part, *far, strict=True)]
    return made


@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (3, 5), (130, 9)])
def test_equals_a_slow_twin(average, filter_wise, rows, columns):
    """Fewer rows than a piece, and more. In one row an expert did not move."""
    draw = random.Random(rows)
    base = [draw.gauss(0, 1) for _ in range(rows * columns)]
    lean = [draw.gauss(0, 1) for _ in base]
    models = [[b + x + draw.gauss(0, 0.7) for b, x in zip(base, lean, strict=True)] for _ in range(4)]
    models[1][:columns] = base[:columns]
    base, *models = ([torch.tensor(v).item() for v in m] for m in (base, *models))
    made = merged(ModelStock(filter_wise=filter_wise, average=average), base, models, (rows, columns))
    assert made == pytest.approx(twin(base, models, rows, filter_wise, average), abs=2e-5)


def test_rows_of_vectors_and_of_higher_tensors():
    """A vector is one row; of three dimensions the last is a row."""
    for fields in ({}, {"filter_wise": True}):
        assert merged(ModelStock(**fields), BASE, experts(3)) == pytest.approx(MERGEKIT[1][2], abs=1e-6)
    made = merged(ModelStock(filter_wise=True), BASE, experts(3), (2, 1, 4))
    assert made == pytest.approx(MERGEKIT[3][2], abs=1e-6)


def test_ends():
    """Experts that agree keep their mean, right angles the base; opposites would have no t, and keep it too."""
    assert merged(ModelStock(), [1.0, 1.0], [[2.0, 3.0], [3.0, 5.0]]) == merged(Linear(), [1.0, 1.0], [[2, 3], [3, 5]])
    for fields in ({}, {"filter_wise": True}):
        assert merged(ModelStock(**fields), [1.0, 1.0], [[2.0, 1.0], [1.0, 2.0]], (1, 2)) == [1.0, 1.0]
        assert merged(ModelStock(**fields), [1.0, 2.0], [[2.0, 3.0], [0.5, 1.5]], (1, 2)) == [1.0, 2.0]
    third = [[1.0, 0.0], [-0.5, math.sqrt(3) / 2], [-0.5, -math.sqrt(3) / 2]]
    assert merged(ModelStock(), [0.0, 0.0], third) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_one_expert_is_given_back():
    for fields in ({}, {"filter_wise": True}):
        made = merged(ModelStock(**fields), BASE, experts(1), (2, 4))
        assert made == pytest.approx(experts(1)[0], abs=1e-7)


def test_the_angle_is_the_tensors_unless_asked_for_rows():
    assert merged(ModelStock(), BASE, experts(3), (2, 4)) == pytest.approx(MERGEKIT[1][2], abs=1e-6)


def test_near_the_singularity_t_is_large():
    """1 + cos a = 2e-5: t is -1e5, and the mean change is half of sin a."""
    far = math.acos(2e-5 - 1)
    made = merged(ModelStock(), [0.0, 0.0], [[1.0, 0.0], [math.cos(far), math.sin(far)]])
    assert made[1] == pytest.approx(-1e5 * math.sin(far) / 2, rel=0.01)


def test_mean_angles_beyond_the_singularity():
    """Two experts this way and two that: four angles of 180 degrees and two of 0, 120 in the mean; so t = 4 *
    -1/2 / (1 - 3/2) = 4. No mean of cosines can be below -1/3."""
    made = merged(ModelStock(average="angle"), [5.0, 5.0], [[7.0, 5.0], [6.0, 5.0], [4.0, 5.0], [4.0, 5.0]])
    assert made == pytest.approx([6.0, 5.0], rel=1e-5)


def test_wide_angles_lead_away():
    """At 120 degrees t = 2 * -1/2 / (1 - 1/2) = -2."""
    made = merged(ModelStock(), [0.0, 0.0], [[1.0, 0.0], [-0.5, math.sqrt(3) / 2]])
    assert made == pytest.approx([-2 * 0.25, -2 * math.sqrt(3) / 4], rel=1e-5)


def test_each_tensor_has_its_own_angle():
    base = {n: torch.zeros(2) for n in "ab"}
    models = [{"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0])},
              {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0])}]  # fmt: skip
    made = transform_tensors(ModelStock(), base, models, Context())
    assert made["a"].tolist() == [0.0, 0.0] and made["b"].tolist() == [1.0, 0.0]
