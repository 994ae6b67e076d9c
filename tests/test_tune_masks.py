"""LIFT on models: what it selects, how masks are shared, refreshed and refused."""

import pytest
import torch
import transformers

from luthier.checkpoint.anatomy import places
from luthier.checkpoint.delta import Delta
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.low_rank import leading, project, refine
from luthier.kit.top import jaccard
from luthier.testing import tiny
from luthier.testing.tune import Run
from luthier.tune.lift import Lift


def test_the_largest_entries_train():
    """zihanghliu/LIFT from 37f5305 on: `largest = 'largest' in mask_type` with the scripts' mask_type
    "lift_sparse" is False, and topk(|W_r|, k, largest=False) takes the k smallest. With the word of 852fb02,
    "weight_filtered_mag_abs_largest_sparse", it takes the k largest, as the paper says, and as we do."""
    assert ("largest" in "lift_sparse") is False
    W = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    low = ((U[:, :5] * S[:5]) @ Vh[:5]).abs().view(-1)
    k = (48 + 96) * 3
    ours = Lift(lora_rank=3, rank=5).mask(W)[0].long()
    assert jaccard(ours, low.topk(k, largest="largest" in "weight_filtered_mag_abs_largest_sparse").indices) == 1.0
    assert jaccard(ours, low.topk(k, largest="largest" in "lift_sparse").indices) == 0.0
    assert low[ours].min() >= low.kthvalue(low.numel() - k + 1).values


def test_warm_masks_follow_a_moving_matrix():
    """After a clear move the old mask is wrong, the warm one is right, and it keeps so over ten moves."""
    gen = torch.Generator().manual_seed(1)
    W = torch.randn(96, 160, generator=gen) + 3 * torch.randn(96, 8, generator=gen) @ torch.randn(8, 160, generator=gen)
    method = Lift(rank=6)
    first, vectors = method.mask(W)
    for _ in range(10):
        W += 0.6 * torch.randn(W.shape, generator=gen)
        warm, vectors = method.mask(W, vectors)
        assert jaccard(warm, method.mask(W)[0]) > 0.97
    assert jaccard(first, warm) < 0.9


def test_refine_turns_to_the_leading_vectors():
    gen = torch.Generator().manual_seed(2)
    W = torch.randn(30, 50, generator=gen)
    exact = project(W, leading(W, 3))
    V = torch.linalg.qr(torch.randn(30, 12, generator=gen)).Q
    errors = [(project(W, refine(W, V, steps)[:, :3]) - exact).norm().item() for steps in (0, 1, 4, 60)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]
    U, S, Vh = torch.linalg.svd(W)
    assert torch.allclose(exact, (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-4)
    assert torch.allclose(project(W.T, leading(W.T, 3)), exact.T, atol=1e-4)


def test_fused_experts():
    """In a mixture whose experts are one tensor in memory, each expert's matrix has its own budget, and the
    delta goes to disk under the names there."""
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
        experts_implementation="eager",
    )  # fmt: skip
    model = tiny.redraw_(transformers.OlmoeForCausalLM(config), 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = Run(Lift(share=0.1, targets=("moe.up", "moe.down")), model)
    run.tuned.after_step(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    size = 32 * 32
    assert set(run.tuned.indices()) == {name, "model.layers.0.mlp.experts.down_proj"}
    per_expert = torch.bincount(run.tuned.indices()[name].long() // size)
    assert per_expert.tolist() == [round(0.1 * size)] * 4
    ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    run.backward(ids)
    run.step()
    delta = run.tuned.delta()
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in delta.changes
    assert set(delta.changes) <= set(places(model))
    delta.revert_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_delta_survives_disk_and_holds_only_what_moved(tmp_path):
    run = Run(Lift(share=0.02)).steps(2)
    delta = Delta.open(run.tuned.delta().save(tmp_path / "delta"))
    entries = sum(leaf.numel() for leaf in run.tuned.leaves())
    assert delta.kind == "sparse" and delta.nbytes <= entries * 12
    fresh = Run(Lift(share=0.02)).tuned.delta()
    assert all(change.index.numel() == 0 for change in fresh.changes.values())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"share": 0.1, "lora_rank": 4}, "share and lora_rank are two ways"),
        ({"share": 0.0}, "out of range"),
        ({"block": 3}, "unknown value"),
        ({"select": "smallest"}, "unknown field"),
    ],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match=says):
        Lift(**fields)


def test_targets_that_match_nothing_are_named():
    with pytest.raises(LuthierError, match=r"'attn\.z' matches nothing.*attn\.q"):
        Lift(targets=("attn.q", "attn.z")).bind(tiny.llama(), Context())
    with pytest.raises(LuthierError, match="does not divide into 4 x 4"):
        Lift(block=4).bind(tiny.llama(intermediate_size=46), Context())
