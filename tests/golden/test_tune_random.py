"""Random masks: the right number, uniform, keyed; and training against a dense twin with the same mask."""

import math

import pytest
import torch

from luthier.kit.context import Context
from luthier.testing import tiny
from luthier.testing.tune import batches
from luthier.tune.random import Random

NAME = "model.layers.1.mlp.up_proj.weight"


def bound(seed=0, **fields):
    model = tiny.llama().train()
    return model, Random(**fields).bind(model, Context(seed=seed, step="golden"))


def test_a_draw_is_the_largest_of_keyed_uniforms():
    """By hand: the uniforms of the key, sorted, the k largest."""
    model, tuned = bound(share=0.1, every=None)
    shape = model.get_parameter(NAME).shape
    uniform = torch.rand(shape, generator=Context(step="golden").rng("mask", NAME, 0, 0)).view(-1)
    k = round(0.1 * shape.numel())
    expected = sorted(range(shape.numel()), key=lambda j: -uniform[j].item())[:k]
    assert tuned.indices()[NAME].tolist() == sorted(expected)


def test_masks_differ_between_matrices_seeds_and_draws():
    _, tuned = bound()
    a, b = tuned.indices()[NAME], tuned.indices()[NAME.replace("1", "0")]
    _, other = bound(seed=1)
    assert not torch.equal(a, b) and not torch.equal(a, other.indices()[NAME])
    _, tuned = bound(every=2)
    first = dict(tuned.indices())
    tuned.after_step(1)
    assert all(torch.equal(first[n], i) for n, i in tuned.indices().items())
    tuned.after_step(2)
    assert all(not torch.equal(first[n], i) for n, i in tuned.indices().items())


def test_every_entry_is_as_likely():
    """Over 400 draws each entry of a 6 x 8 matrix is chosen within five deviations of 400 * 12 / 48 = 100."""
    counts = torch.zeros(48)
    for seed in range(400):
        model = torch.nn.Linear(8, 6, bias=False)
        index = Random(share=0.25)._draw(model.weight.detach(), Context(seed=seed), ("w", 0, 0))
        assert index.numel() == 12
        counts[index] += 1
    assert (counts - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_squares_are_whole():
    model, tuned = bound(share=0.1, block=4)
    shape = model.get_parameter(NAME).shape
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[tuned.indices()[NAME].long()] = True
    per_square = mask.view(shape[0] // 4, 4, shape[1] // 4, 4).sum((1, 3))
    assert set(per_square.unique().tolist()) == {0, 16}
    assert int((per_square == 16).sum()) == round(0.1 * shape.numel() / 16)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_training_is_masked_training(share):
    """Against a dense loop in which gradients outside the mask are zeroed and torch's AdamW sees all."""
    from luthier.optim.adamw import AdamW

    model, tuned = bound(share=share, every=None)
    optimizer = AdamW(fused=False).make(tuned.leaves(), [{**g, "lr": 1e-2} for g in tuned.groups()])
    dense = tiny.llama().train()
    masks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in dense.named_parameters()}
    for name, index in tuned.indices().items():
        masks[name][index.long()] = True
    adam = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for step, ids in enumerate(batches(6), 1):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        tuned.after_step(step)
        optimizer.zero_grad()
        adam.zero_grad()
        dense(ids, labels=ids).loss.backward()
        for name, p in dense.named_parameters():
            p.grad *= masks[name].view(p.shape)
        adam.step()
    for (name, mine), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_defaults_are_those_of_a_chosen_mask():
    """So that a control differs in the choice alone: the fields that Lift has too have its defaults."""
    from luthier.tune.lift import Lift

    own, lift = Random().to_dict()["set"], Lift().to_dict()["set"]
    assert own == {name: lift[name] for name in own}
    assert own["every"] == 200 and own["share"] is None


def test_one_budget_only():
    from luthier.errors import LuthierError

    with pytest.raises(LuthierError, match="two ways to say the same"):
        Random(share=0.1, lora_rank=2)
    assert Random(lora_rank=2).share is None
