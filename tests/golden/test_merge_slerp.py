"""SLERP against hand calculation, a slow twin in doubles, and numbers from mergekit 0.1.5."""

import math
import random

import pytest
import torch

from luthier.engine.pieces import CHUNK
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.angles import flat_gram
from luthier.kit.context import Context
from luthier.merge.interpolate import Interpolate
from luthier.merge.slerp import Slerp

BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [8, -1, -16, 2, 0, -9, 4, 12]


def merged(method, base, expert, ctx=None):
    made = transform_tensors(method, {"w": torch.tensor(base)}, [{"w": torch.tensor(expert)}], ctx or Context())
    return made["w"].tolist()


def moved(by):
    return [b + m / by for b, m in zip(BASE, MOVED, strict=True)]


def test_a_quarter_turn_by_hand():
    """At right angles the factors are cos and sin of t quarter turns, whatever the lengths: 3 and 4."""
    made = merged(Slerp(t=1 / 3), [3.0, 0.0], [0.0, 4.0])
    assert made == pytest.approx([3 * math.cos(math.pi / 6), 4 * math.sin(math.pi / 6)], rel=1e-6)
    assert merged(Slerp(), [3.0, 0.0], [0.0, 4.0]) == pytest.approx([3 / math.sqrt(2), 4 / math.sqrt(2)], rel=1e-6)


def test_the_arc_keeps_the_length():
    """Two unit vectors 60 degrees apart: a third of the way is a unit vector at 20 degrees."""
    far = math.radians(60)
    made = merged(Slerp(t=1 / 3), [1.0, 0.0], [math.cos(far), math.sin(far)])
    assert made == pytest.approx([math.cos(far / 3), math.sin(far / 3)], rel=1e-6)


# mergekit 0.1.5, `merge_tensors([base, expert], "slerp", base_index=0)` in fp32: cosines 0.981, -0.313 and 0.99985.
MERGEKIT = [
    (64, 0.3, [0.539684653, -0.255699694, 0.928514779, 0.009428404, -1.003942013, 0.710528672, 0.14434956,
               -0.445400596]),
    (64, 0.8, [0.601726532, -0.263278842, 0.80255264, 0.025056278, -1.003002882, 0.639498889, 0.175487906,
               -0.351163775]),
    (4, 0.3, [1.924019337, -0.537919939, -0.675584912, 0.282726467, -1.586226821, -0.082598984, 0.763731301,
              0.903245449]),
    (4, 0.8, [2.822227955, -0.622725964, -2.765016317, 0.525592029, -1.439719677, -1.285374284, 1.231148958,
              2.433692455]),
    (640, 0.3, [0.503749967, -0.250468761, 0.992500007, 0.0009375, -1.0, 0.745781243, 0.126874998, -0.49437499]),
    (640, 0.8, [0.50999999, -0.251249999, 0.980000019, 0.0025, -1.0, 0.738749981, 0.129999995, -0.484999985]),
]  # fmt: skip


@pytest.mark.parametrize(("by", "t", "theirs"), MERGEKIT)
def test_mergekits_numbers(by, t, theirs):
    assert merged(Slerp(t=t), BASE, moved(by)) == pytest.approx(theirs, abs=1e-6)


def test_zeros_count_as_a_right_angle():
    """mergekit's numbers, too: 0.454 = sin(0.3 quarter turns) of the expert, 0.891 of the base."""
    made = merged(Slerp(t=0.3), [0.0] * 8, [m / 64 for m in MOVED])
    assert made[:4] == pytest.approx([0.056748819, -0.007093602, -0.113497637, 0.014187205], abs=1e-7)
    assert merged(Slerp(t=0.3), BASE, [0.0] * 8)[:3] == pytest.approx([0.445503265, -0.222751632, 0.891006529])
    assert merged(Slerp(), [0.0] * 8, [0.0] * 8) == [0.0] * 8


@pytest.mark.parametrize("threshold", [0.9995, 1.0])
def test_opposites_and_equals_take_the_line(threshold):
    assert merged(Slerp(t=0.3, threshold=threshold), BASE, [-b for b in BASE]) == pytest.approx([0.4 * b for b in BASE])
    assert merged(Slerp(t=0.3, threshold=threshold), BASE, [3 * b for b in BASE]) == pytest.approx(
        [1.6 * b for b in BASE]
    )


def test_threshold_of_one_keeps_to_the_arc():
    """Unit vectors a hundredth apart, cosine 0.99995: the chord's middle is shorter by 1.25e-5."""
    far = 0.01
    one, two = [1.0, 0.0], [math.cos(far), math.sin(far)]
    length = {th: math.hypot(*merged(Slerp(threshold=th), one, two)) for th in (0.9995, 1.0)}
    assert length[1.0] == pytest.approx(1.0, abs=2e-7)
    assert length[0.9995] == pytest.approx(math.cos(far / 2), abs=2e-7)


@pytest.mark.parametrize("cosine", [0.89, 0.91, -0.89, -0.91])
def test_threshold_is_of_the_cosine_in_magnitude(cosine):
    base, expert = [1.0, 0.0], [cosine, math.sqrt(1 - cosine * cosine)]
    same = merged(Slerp(threshold=0.9), base, expert) == pytest.approx(merged(Interpolate(), base, expert), abs=1e-6)
    assert same == (abs(cosine) > 0.9)


def test_the_threshold_may_vary_by_name():
    base, expert = torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.6])
    method = Slerp(threshold={"arc": 0.9, "line": 0.7})
    made = transform_tensors(method, dict.fromkeys(("arc", "line"), base), [dict.fromkeys(("arc", "line"), expert)],
                             Context())  # fmt: skip
    for name, alone in (("arc", Slerp(threshold=0.9)), ("line", Slerp(threshold=0.7))):
        assert made[name].tolist() == merged(alone, base.tolist(), expert.tolist())
    assert made["arc"].tolist() != made["line"].tolist()


def test_a_cosine_at_the_threshold_is_not_above_it():
    assert merged(Slerp(threshold=0.0), [1.0, 0.0], [0.0, 1.0]) == pytest.approx([math.sqrt(0.5)] * 2)


def test_tiny_angles_are_angles():
    """A cosine of 1 - 1e-11: at t = 100,000 the arc has turned by 0.447, and the line has gone straight on."""
    far = 4.47e-6
    made = merged(Slerp(t=1e5, threshold=1.0), [1.0, 0.0], [1.0, far])
    assert made == pytest.approx([math.cos(1e5 * far), math.sin(1e5 * far)], abs=0.02)


def twin(t, base, expert):
    """SLERP of lists of floats in doubles."""
    dot = math.fsum(a * b for a, b in zip(base, expert, strict=True))
    angle = math.acos(dot / math.hypot(*base) / math.hypot(*expert))
    one, other = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [one * a + other * b for a, b in zip(base, expert, strict=True)]


@pytest.mark.parametrize("size", [1, 5, 1023, 1025, CHUNK + 333])
def test_equals_a_slow_twin(size):
    """Whatever the stretches: one, several, ones that end in the middle of a lane."""
    draw = random.Random(size)
    base = torch.tensor([draw.gauss(0.5, 1) for _ in range(size)])
    expert = torch.tensor([draw.gauss(0, 2) for _ in range(size)])
    made = merged(Slerp(t=0.3, threshold=1.0), base.tolist(), expert.tolist())
    if size > 1:
        assert made == pytest.approx(twin(0.3, base.tolist(), expert.tolist()), abs=1e-6)
    else:
        assert made == pytest.approx([0.7 * base.item() + 0.3 * expert.item()], abs=1e-6)


def test_outside_of_the_arc():
    """t beyond 0 and 1 goes on around the circle."""
    assert merged(Slerp(t=2.0), [1.0, 0.0], [0.0, 1.0]) == pytest.approx([-1.0, 0.0], abs=1e-6)


def test_t_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base = {n: torch.tensor([1.0, 0.0]) for n in names}
    expert = {n: torch.tensor([0.0, 1.0]) for n in names}
    method = Slerp(t={"*": [0.0, 1.0], "lm_head*": 1 / 3})
    made = transform_tensors(method, base, [expert], Context())
    turns = [math.atan2(*reversed(made[n].tolist())) / (math.pi / 2) for n in names]
    assert turns == pytest.approx([0.0, 0.5, 1.0, 1 / 3], abs=1e-6)


def test_each_tensor_has_its_own_angle():
    base = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0, 0.0])}
    expert = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([4.0, 0.0])}
    made = transform_tensors(Slerp(), base, [expert], Context())
    assert made["a"].tolist() == pytest.approx([math.sqrt(0.5)] * 2) and made["b"].tolist() == [3.0, 0.0]


def test_log_says_how_many_are_linear():
    said = []
    base = {n: torch.tensor([1.0, 0.0]) for n in "abc"}
    expert = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([1.0, 0.001])}
    transform_tensors(Slerp(), base, [expert], Context(watch=said.append))
    texts = [event["text"] for event in said if event["kind"] == "log"]
    assert texts == ["merge.slerp: 2 of 3 tensors are interpolated linearly, not on an arc"]


def test_sums_do_not_depend_on_torchs_threads():
    vectors = torch.randn(2, CHUNK, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(flat_gram(list(vectors)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.allclose(found[0], vectors.double() @ vectors.double().T, rtol=1e-12)


def test_what_cannot_be():
    with pytest.raises(LuthierError, match="t: no pattern matches 'w'"):
        merged(Slerp(t={"x": 0.5}), BASE, BASE)
    with pytest.raises(LuthierError, match="threshold: no pattern matches 'w'"):
        merged(Slerp(threshold={"x": 0.5}), BASE, BASE)
    with pytest.raises(LuthierError, match="takes 1 expert, and 2 are given"):
        transform_tensors(Slerp(), {"w": torch.ones(2)}, [{"w": torch.ones(2)}] * 2, Context())
    with pytest.raises(LuthierError, match="up to 1"):
        Slerp(threshold=1.5)
