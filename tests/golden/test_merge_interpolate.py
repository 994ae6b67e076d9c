"""Interpolation by hand, against plain Python, mergekit 0.1.5's linear, and the released script's arithmetic."""

import pytest
import torch

from luthier.engine.stream import run_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.interpolate import Interpolate

BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
EXPERT = [0.625, -0.265625, 0.75, 0.03125, -1.0, 0.609375, 0.1875, -0.3125]


def merged(method, base=BASE, expert=EXPERT):
    made = transform_tensors(method, {"w": torch.tensor(base)}, [{"w": torch.tensor(expert)}], Context())
    return made["w"].tolist()


def test_by_hand():
    """Everything here is exact in fp32."""
    quarter = [0.53125, -0.25390625, 0.9375, 0.0078125, -1.0, 0.71484375, 0.140625, -0.453125]
    assert merged(Interpolate(share=0.25)) == quarter
    assert merged(Interpolate()) == [(b + e) / 2 for b, e in zip(BASE, EXPERT, strict=True)]
    assert merged(Interpolate(share=2.0)) == [2 * e - b for b, e in zip(BASE, EXPERT, strict=True)]


# mergekit 0.1.5, `merge_tensors([base, expert], "linear", parameters={"weight": [1 - share, share]})` in fp32.
MERGEKIT = [
    (0.3, [0.537500024, -0.254687488, 0.925000012, 0.009375, -1.0, 0.707812488, 0.143749997, -0.443749994]),
    (0.8, [0.600000024, -0.262500018, 0.800000012, 0.025, -1.0, 0.637499988, 0.174999997, -0.349999994]),
]


@pytest.mark.parametrize(("share", "theirs"), MERGEKIT)
def test_is_mergekits_linear_of_two(share, theirs):
    assert merged(Interpolate(share=share)) == pytest.approx(theirs, abs=1e-7)


def test_the_papers_last_two_thirds():
    """36 layers: the first twelve stay Instruct's, the others are interpolated, and so is what lies outside."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(36))]
    base, expert = {n: torch.zeros(2) for n in names}, {n: torch.ones(2) for n in names}
    method = Interpolate(share={"*": 0.75, "model.layers.[0-9].*": 0.0, "model.layers.1[01].*": 0.0})
    made = transform_tensors(method, base, [expert], Context())
    assert [made[n][0].item() for n in names] == [0.75] + [0.0] * 12 + [0.75] * 24


def test_a_list_varies_over_depth():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base, expert = {n: torch.zeros(2) for n in names}, {n: torch.ones(2) for n in names}
    made = transform_tensors(Interpolate(share=[0.0, 1.0]), base, [expert], Context())
    assert [made[n][0].item() for n in names] == [0.0, 0.5, 1.0, 1.0]


def test_the_ends_are_exact():
    """Entries far apart: b + 1 * (e - b) is not e in fp32."""
    base, expert = [1e8, -3.0, 1e-8], [1.0, 1e8, 1.0]
    assert merged(Interpolate(share=1.0), base, expert) == torch.tensor(expert).tolist()
    assert merged(Interpolate(share=0.0), base, expert) == torch.tensor(base).tolist()


def test_released_code_rounds_three_times():
    """b + lambda * (i - b) in bfloat16, as MI 2e039ee does: some entries of a thousand are not the rounded value."""
    gen = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=gen).bfloat16()
    expert = (base.float() + 0.1 * torch.randn(1000, generator=gen)).bfloat16()
    exact = base.double() * 0.7 + expert.double() * 0.3
    made = transform_tensors(Interpolate(share=0.3), {"w": base}, [{"w": expert}], Context())["w"]
    theirs = base + 0.3 * (expert - base)
    assert torch.equal(made, exact.bfloat16())
    assert (theirs != exact.bfloat16()).sum() > 20


def test_one_expert_and_patterns_for_all():
    with pytest.raises(LuthierError, match="takes 1 expert, and 2 are given"):
        transform_tensors(Interpolate(), {"w": torch.ones(2)}, [{"w": torch.ones(2)}] * 2, Context())
    with pytest.raises(LuthierError, match="share: no pattern matches 'w'"):
        merged(Interpolate(share={"x": 0.5}))
    with pytest.raises(LuthierError, match="needs a base"):
        run_transform(Interpolate(), None, [None], "nowhere", Context())
