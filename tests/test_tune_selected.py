"""Selected leaves: gradients gathered and freed, fp32 masters, moves between selections; and the selection kit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from luthier.errors import LuthierError
from luthier.kit.sparse import Selected, budget, compact, matching, pick
from luthier.kit.top import jaccard, threshold, top_indices
from luthier.testing import tiny
from luthier.testing.tune import Run, batches
from luthier.tune.random import Random


class Matrix(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(values)


def selected(values, first, then=(), every=1, **options):
    """One matrix; the selections that `choose` gives, one after the other."""
    model, queue = Matrix(values), list(then)
    tuned = Selected(
        model, {"weight": model.weight}, {"weight": torch.tensor(first)}, dict,
        lambda name, weight, step: torch.tensor(queue.pop(0)), every if then else None, **options,
    )  # fmt: skip
    return model, tuned, tuned.leaves()[0]


def test_gradients_are_gathered_added_and_freed():
    model, _, leaf = selected(torch.arange(6.0).view(2, 3), [0, 2, 5])
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for count in (1, 2):
        (model.weight * scale).sum().backward()
        assert model.weight.grad is None
        assert leaf.grad.tolist() == [count * v for v in (1.0, 3.0, 6.0)]


def test_moves_by_hand():
    """Entries 2 and 5 stay, 0 goes, 1 comes; 0 keeps what it reached; later 0 returns with that value."""
    model, tuned, leaf = selected(torch.arange(6.0).view(2, 3), [0, 2, 5], [[1, 2, 5], [0, 1, 4]])
    with torch.no_grad():
        leaf += 10
    (move,) = tuned.after_step(1)
    assert move.leaf is leaf and move.source.tolist() == [-1, 1, 2]
    assert leaf.tolist() == [1.0, 12.0, 15.0]
    assert model.weight.view(-1).tolist() == [10.0, 1.0, 12.0, 3.0, 4.0, 15.0]
    with torch.no_grad():
        leaf += 100
    (move,) = tuned.after_step(2)
    assert move.source.tolist() == [-1, 0, -1] and leaf.tolist() == [10.0, 101.0, 4.0]
    assert model.weight.view(-1).tolist() == [10.0, 101.0, 112.0, 3.0, 4.0, 115.0]
    index, before, now = tuned.delta()["weight"]
    assert index.tolist() == [0, 1, 2, 5] and before.tolist() == [0.0, 1.0, 2.0, 5.0]
    assert now.tolist() == [10.0, 101.0, 112.0, 115.0]


def test_state_of_dropped_entries_comes_back():
    model, tuned, leaf = selected(torch.arange(6.0).view(2, 3), [0, 2, 5], [[1, 2, 5]])
    with torch.no_grad():
        leaf += 0.25
    tuned.after_step(1)
    other, again, _ = selected(torch.arange(6.0).view(2, 3), [0, 2, 5], [[0, 1, 2]])
    again.load_state({k: v.clone() for k, v in tuned.state().items()})
    assert torch.equal(model.weight, other.weight)
    for mine, theirs in zip(tuned.delta()["weight"], again.delta()["weight"], strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_of_another_selection_is_refused():
    _, tuned, _ = selected(torch.zeros(2, 3), [0, 2, 5])
    _, other, _ = selected(torch.zeros(2, 3), [0, 2])
    with pytest.raises(LuthierError, match="weight: the saved selection is not of this model"):
        other.load_state(tuned.state())
    with pytest.raises(LuthierError, match="not of this model"):
        tuned.load_state({})


def test_masters_are_finer_than_bfloat16():
    """Steps of 1/4096 of a weight are lost in bfloat16; in the leaf they add up and show after a while."""
    model, tuned, leaf = selected(torch.ones(2, 3, dtype=torch.bfloat16), [1, 4])
    for step in range(1, 17):
        with torch.no_grad():
            leaf += 2.0**-12
        tuned.after_step(step)
    assert leaf.dtype == torch.float32 and leaf.tolist() == [1 + 2.0**-8] * 2
    assert model.weight.dtype == torch.bfloat16
    for step in range(17, 33):
        with torch.no_grad():
            leaf += 2.0**-12
        tuned.after_step(step)
    assert model.weight.view(-1).tolist() == [1.0, 1 + 2.0**-7, 1.0, 1.0, 1 + 2.0**-7, 1.0]


def test_indices_are_32_bits_where_they_fit():
    _, tuned, _ = selected(torch.zeros(2, 3), [0, 2, 5])
    assert tuned.indices()["weight"].dtype == torch.int32
    assert compact(torch.tensor([1]), 2**31 - 1).dtype == torch.int32
    assert compact(torch.tensor([1]), 2**31).dtype == torch.int64


def test_state_is_small():
    """Per entry: moments 8 bytes, leaf 4, index 4, the value before 4; under 10 % of AdamW's at 5 %."""
    run = Run(Random(share=0.05, every=None)).steps(1)
    entries = sum(leaf.numel() for leaf in run.tuned.leaves())
    trained = sum(p.numel() for n, p in run.model.named_parameters() if p.dim() == 2 and ".layers." in n)
    moments = sum(v.nbytes for s in run.optimizer.state.values() for v in s.values() if v.dim())
    assert moments == 8 * entries
    assert sum(t.nbytes for t in run.tuned.state().values()) == 8 * entries
    assert (moments + 8 * entries) <= 0.101 * 8 * trained


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    plain, saving = Run(Random()), Run(Random())
    saving.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        saving.model.enable_input_require_grads()
    for run in (plain, saving):
        run.backward(batches(1)[0])
    for a, b in zip(plain.tuned.leaves(), saving.tuned.leaves(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_words_for_targets():
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=True)
    roles = {n: ("norm",) if "norm" in n else ("attn.q",) if "q_proj" in n else () for n, _ in model.named_parameters()}
    every = list(matching(model, ["linear"], roles))
    assert len(every) == 7 and all("proj" in n for n in every)
    assert list(matching(model, ["attn.*"], roles)) == ["model.layers.0.self_attn.q_proj.weight"]
    assert list(matching(model, ["*embed*", "*q_proj*"], roles)) == [
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
    ]  # fmt: skip
    assert len(matching(model, ["norm"], roles, axes=1)) == 3
    with pytest.raises(LuthierError, match="'norm' matches nothing"):
        matching(model, ["norm"], roles)
    assert len(matching(model, ["*"], roles, axes=1)) == len(list(model.parameters()))


def test_learned_positions_are_no_linear_target():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert all(".h.0." in n for n in matching(model, ["linear"], {}))


def test_budgets():
    assert budget((40, 60), None, None) == 120
    assert budget((40, 60), 0.1, None) == 240
    assert budget((40, 60), None, 3) == 300
    assert budget((4, 6), None, 3) == 24
    assert budget((4, 6), 1e-6, None) == 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_top_indices_is_a_stable_sort(values, data):
    """Exactly k, the largest, ties by place; integers as floats make ties common."""
    k = data.draw(st.integers(1, len(values)))
    score = torch.tensor(values, dtype=torch.float32)
    expected = sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:k])
    for kind in (torch.float32, torch.float64):  # the integer path and the general one
        assert top_indices(score.to(kind), k).tolist() == expected
        assert threshold(score.to(kind), k).item() == sorted(values, reverse=True)[k - 1]


def test_pick_takes_all_there_is_and_no_more():
    score = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert pick(score, 64).tolist() == list(range(64)) == pick(score, 64, 4).tolist()
    assert pick(score, 100).numel() == 64
    assert pick(score, 1, 4).numel() == 16


def test_jaccard():
    assert jaccard(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4, 5])) == 0.4
    assert jaccard(torch.tensor([1]), torch.tensor([2])) == 0.0
