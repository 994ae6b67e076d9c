"""LoRA from a difference: against full decompositions, through PEFT, and what is left behind by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from luthier.checkpoint.delta import Delta
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.extract import extract
from luthier.checkpoint.reader import Checkpoint
from luthier.cli import main
from luthier.errors import LuthierError
from luthier.kit.factors import factors
from luthier.testing import tiny

Q = "model.layers.0.self_attn.q_proj.weight"


def drawn(rows, columns, decay=0.0, seed=0):
    """A random matrix whose singular values fall as exp(-decay·i)."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=gen)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag(s * torch.exp(-decay * torch.arange(len(s)))) @ v


@pytest.mark.parametrize("decay", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("shape, rank", [((40, 70), 6), ((70, 40), 40), ((300, 500), 5), ((500, 300), 16)])
def test_factors_against_the_full_decomposition(shape, rank, decay):
    """The slow twin: torch.linalg.svd in fp64. The larger shapes take the iteration."""
    w = drawn(*shape, decay)
    b, a, kept = factors(w, rank)
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    least = float((w - best).square().sum())
    total, got = float(s.square().sum()), float((w.double() - (b @ a).double()).square().sum())
    assert a.shape[0] == b.shape[1] <= rank and b.shape[0] == shape[0] and a.shape[1] == shape[1]
    assert least - 1e-5 * total <= got <= least + 1e-4 * total
    assert kept == pytest.approx(1 - got / total, abs=1e-5)
    if decay == 0.3:  # a gap: the product itself is determined
        torch.testing.assert_close((b @ a).double(), best, atol=1e-4 * float(s[0]), rtol=0)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-6)  # the root on each


def test_factors_by_hand():
    """diag(4, 2, 1): rank 1 keeps 16 of 21, rank 2 keeps 20; 90 % of the energy takes rank 2."""
    w = torch.zeros(3, 5)
    w[0, 1], w[1, 0], w[2, 4] = 4.0, 2.0, -1.0
    for rank, kept in ((1, 16 / 21), (2, 20 / 21), (3, 1.0)):
        b, a, share = factors(w, rank)
        assert share == pytest.approx(kept, rel=1e-5) and a.shape[0] == rank
    b, a, share = factors(w, None, energy=0.9)
    assert a.shape[0] == 2 and share == pytest.approx(20 / 21, rel=1e-5)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([1.0, 1.0, 0.0])) @ w)
    assert factors(w, 1, energy=0.9)[1].shape[0] == 1, "rank is a limit"
    assert factors(torch.outer(torch.arange(4.0), torch.ones(6)), 3)[1].shape[0] == 1, "no rank that is not there"


@pytest.fixture
def pair(tmp_path):
    base = tiny.llama()
    fine = tiny.moved(base, 1)
    tiny.save(base, tmp_path / "base")
    tiny.save(fine, tmp_path / "fine")
    return base, fine, Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "fine")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_with_everything_kept_peft_gives_the_tuned_model(tmp_path, tied):
    """Merged or not; a tied head stays tied, and reads back as one change."""
    base = tiny.llama(tie_word_embeddings=tied)
    fine = tiny.moved(base, 1)
    tiny.save(base, tmp_path / "base")
    tiny.save(fine, tmp_path / "fine")
    opened = Checkpoint.open(tmp_path / "base")
    made = extract(Checkpoint.open(tmp_path / "fine"), opened, None, energy=1.0, rest="full")
    made.delta.save(tmp_path / "lora")
    assert not made.left and made.total == pytest.approx(1) and made.kept.keys() == opened.tensors.keys()
    adapted = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=tied), str(tmp_path / "lora")).eval()
    assert (logits(adapted) - logits(fine)).abs().max() < 1e-5 < (logits(base) - logits(fine)).abs().max()
    merged = adapted.merge_and_unload()
    assert (logits(merged) - logits(fine)).abs().max() < 1e-5
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    expert = open_expert(tmp_path / "lora", opened)
    for name, tensor in Checkpoint.open(tmp_path / "fine").items():
        torch.testing.assert_close(expert.read(name), tensor, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    base = tiny.llama(tie_word_embeddings=True)
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.moved(base, 1), tmp_path / "fine")
    made = extract(Checkpoint.open(tmp_path / "fine"), Checkpoint.open(tmp_path / "base"), 4, rest="full")
    made.delta.save(tmp_path / "lora")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(LuthierError, match="is tied to the embedding, and differs from it"):
        Delta.open(tmp_path / "lora")


def test_what_is_left_is_listed_with_its_share(pair):
    base, fine, old, new = pair
    made = extract(new, old, 4)
    moved = {n: float((a.detach() - b.detach()).double().square().sum())
             for (n, a), b in zip(fine.named_parameters(), base.parameters(), strict=True)}  # fmt: skip
    whole = sum(moved.values())
    assert made.left == {n: pytest.approx(moved[n] / whole) for n in moved if "proj" not in n}
    kept = {n: pytest.approx(_best(fine, base, n, 4), abs=1e-4) for n in moved if "proj" in n}
    assert made.kept == kept and all(c.a.shape[0] == 4 for c in made.delta.changes.values())
    assert made.total == pytest.approx(sum(made.kept[n] * moved[n] for n in made.kept) / whole)


def _best(fine, base, name, rank):
    s = torch.linalg.svdvals((fine.get_parameter(name) - base.get_parameter(name)).detach().double()).square()
    return float(s[:rank].sum() / s.sum())


def test_an_adapter_is_found_again_in_the_merged_model(tmp_path):
    """Trained at rank 3, extracted at rank 16: rank 3, and the same product."""
    base = tiny.llama()
    tiny.save(base, tmp_path / "base")
    adapted = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    gen = torch.Generator().manual_seed(0)
    for name, p in adapted.named_parameters():
        if "lora" in name:
            p.data = torch.randn(p.shape, generator=gen) * 0.2
    merged = adapted.merge_and_unload()
    tiny.save(merged, tmp_path / "fine")
    made = extract(Checkpoint.open(tmp_path / "fine"), Checkpoint.open(tmp_path / "base"), None, energy=1 - 1e-9)
    assert set(made.delta.changes) == {n for n, _ in base.named_parameters() if "q_proj" in n or "down_proj" in n}
    assert made.total == pytest.approx(1) and not made.left
    for name, change in made.delta.changes.items():
        expected = merged.get_parameter(name).detach() - base.get_parameter(name).detach()
        assert change.a.shape[0] <= 4
        torch.testing.assert_close(change.delta(), expected, atol=1e-5, rtol=0)


def test_biases_stay_behind_by_name(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    base = tiny.redraw_(AutoModelForCausalLM.from_config(config), 0)
    base.save_pretrained(tmp_path / "base")
    tiny.moved(base, 1).save_pretrained(tmp_path / "fine")
    made = extract(Checkpoint.open(tmp_path / "fine"), Checkpoint.open(tmp_path / "base"), 4, rest="full")
    assert set(made.left) == {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"}


def test_matrices_that_lie_the_other_way(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    base = tiny.redraw_(AutoModelForCausalLM.from_config(config), 0).eval()
    fine = tiny.moved(base, 1)
    base.save_pretrained(tmp_path / "base")
    fine.save_pretrained(tmp_path / "fine")
    made = extract(Checkpoint.open(tmp_path / "fine"), Checkpoint.open(tmp_path / "base"), None, energy=1.0)
    made.delta.save(tmp_path / "lora")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora"))
    merged = merged.merge_and_unload()
    for name in ("attn.c_attn", "mlp.c_proj"):
        got = merged.get_parameter(f"transformer.h.0.{name}.weight")
        torch.testing.assert_close(got, fine.get_parameter(f"transformer.h.0.{name}.weight"), atol=1e-5, rtol=0)


def test_added_tokens_stay_behind_and_other_shapes_are_refused(pair, tmp_path):
    base, _, old, _ = pair
    tiny.save(tiny.llama(1, vocab_size=tiny.VOCAB + 4), tmp_path / "more")
    made = extract(Checkpoint.open(tmp_path / "more"), old, 2, rest="full")
    gone = {n for n, share in made.left.items() if share is None}
    assert gone == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not gone & made.delta.changes.keys()
    tiny.save(tiny.llama(1, intermediate_size=64), tmp_path / "wide")
    with pytest.raises(LuthierError, match=r"mlp.\w+.weight': is \[.*\] in the base and \[.*\] in the other"):
        extract(Checkpoint.open(tmp_path / "wide"), old)
    with pytest.raises(LuthierError, match="nothing that an adapter holds has changed"):
        extract(old, old)
    for rank, energy in ((0, None), (None, None), (4, 0.0), (4, 1.5)):
        with pytest.raises(LuthierError, match="give a rank from 1"):
            extract(old, old, rank, energy)


def test_the_command(pair, tmp_path, capsys):
    out = tmp_path / "lora"
    assert main(["extract", str(tmp_path / "fine"), str(tmp_path / "base"), str(out), "--rank", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("14 tensors, ") and said[-1] == str(out)
    assert sum(line.startswith("left out: ") for line in said) == 7
    assert said[1].startswith(("left out: model.embed_tokens", "left out: lm_head"))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    again = tmp_path / "again"
    assert main(["extract", str(out), str(tmp_path / "base"), str(again)]) == 0, "from an adapter itself"
    change, was = Delta.open(again).changes[Q], Delta.open(out).changes[Q]
    torch.testing.assert_close(change.delta(), was.delta(), atol=1e-5, rtol=0)
    assert main(["extract", str(out), str(tmp_path / "base"), str(again), "--rest", "ful"]) == 2
    assert "did you mean 'full'?" in capsys.readouterr().err
