"""`luthier diff`: the numbers by hand, deltas as the second, what cannot be compared."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.checkpoint.reader import Checkpoint
from luthier.cli import main
from luthier.engine.changes import changes, summed, unmatched
from luthier.testing import tiny

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """A tiny checkpoint, and a copy whose second layer's q has changed in two directions."""
    old = tiny.checkpoint(tmp_path / "old")
    new = tmp_path / "new"
    tiny.checkpoint(new)
    tensors = load_file(new / "model.safetensors")
    W_MN = tensors[Q]
    u_M, v_M = torch.zeros(W_MN.shape[0]), torch.zeros(W_MN.shape[0])
    u_M[0], v_M[1] = 1.0, 1.0
    tensors[Q] = W_MN + 2.0 * u_M[:, None] + 0.1 * v_M[:, None]
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return old, new


def opened(path):
    return path if isinstance(path, Checkpoint) else Checkpoint.open(path)


def test_one_tensor_by_hand(pair):
    old, new = (opened(p) for p in pair)
    rows = {c.name: c for c in changes(old, new, ranks=True)}
    c, W_MN = rows[Q], old.read(Q).float()
    M, N = W_MN.shape
    norm = (4 * N + 0.01 * N) ** 0.5
    assert (c.role, c.layer, c.short, c.count) == ("attn.q", 1, min(M, N), M * N)
    assert c.moved == pytest.approx(2 / M) and c.norm == pytest.approx(norm, rel=1e-3)
    assert c.relative == pytest.approx(norm / W_MN.norm().item(), rel=1e-3)
    turned = (W_MN.sign() != (opened(pair[1]).read(Q).float()).sign()).sum().item()
    assert turned and c.signs == pytest.approx(1 - turned / (M * N))
    assert c.rank == 1, "the second direction holds a quarter of a percent of the energy"
    others = [o for o in rows.values() if o.name != Q]
    assert others and all((o.moved, o.norm, o.signs, o.rank) == (0, 0, 1, None) for o in others)


def test_rank_of_stacked_experts(tmp_path, capsys):
    """Of four experts one changes in one direction, one in three and two not at all: 2 on the mean over those two."""
    name, plain = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"
    gen = torch.Generator().manual_seed(0)
    W_EMN, U_MR = torch.randn(4, 6, 5, generator=gen), torch.linalg.qr(torch.randn(6, 3, generator=gen))[0]
    V_NR = torch.linalg.qr(torch.randn(5, 3, generator=gen))[0]
    new_EMN = W_EMN.clone()
    new_EMN[1] += U_MR[:, :1] @ V_NR[:, :1].T
    new_EMN[3] += U_MR @ V_NR.T
    for folder, W in (("old", W_EMN), ("new", new_EMN)):
        (tmp_path / folder).mkdir()
        tensors = {name: W.contiguous(), plain: torch.ones(4, 4)}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    rows = {c.name: c for c in changes(*(opened(tmp_path / f) for f in ("old", "new")), ranks=True)}
    assert (rows[name].rank, rows[name].short, rows[name].matrices) == (2.0, 5, 2)
    assert rows[plain].rank is None
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "new"), "--picture", str(tmp_path / "d.svg")]) == 0
    assert "2 of 5" in capsys.readouterr().out


def test_rank_counts_directions(tmp_path, pair):
    tensors = load_file(pair[1] / "model.safetensors")
    gen = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(tensors[Q].shape[0], 3, generator=gen))
    V, _ = torch.linalg.qr(torch.randn(tensors[Q].shape[1], 3, generator=gen))
    old = opened(pair[0])
    tensors[Q] = old.read(Q).float() + U @ V.T
    save_file(tensors, pair[1] / "model.safetensors", metadata={"format": "pt"})
    (c,) = [c for c in changes(old, opened(pair[1]), ranks=True) if c.rank]
    assert c.rank == 3


def test_roles_are_pooled_by_norm_and_size(pair):
    rows = changes(*(opened(p) for p in pair))
    table = {r["what"]: r for r in summed(rows, lambda c: c.role).dicts()}
    of_q = [c for c in rows if c.role == "attn.q"]
    assert table["attn.q"]["tensors"] == len(of_q) == 2
    assert table["attn.q"]["moved"] == pytest.approx(sum(c.moved for c in of_q) / 2)
    weight = sum(c.weight**2 for c in of_q) ** 0.5
    assert table["attn.q"]["relative"] == pytest.approx(max(c.norm for c in of_q) / weight)
    assert table["attn.k"]["norm"] == 0 and table["attn.q"]["rank"] is None


def test_table_picture_and_json(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["diff", str(tmp_path / "old"), str(pair[1])]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "attn.q" in out and out.splitlines()[-1] == "diff.svg"
    svg = (tmp_path / "diff.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "share of signs turned" in svg
    (tmp_path / "diff.svg").unlink()
    assert main([*words, "--json", "--no-rank"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in told["changes"] if c["moved"]] == [Q] and told["unmatched"] == []
    assert not (tmp_path / "diff.svg").exists()
    assert main([*words, "--layers", "--no-rank"]) == 0
    assert "layer 1" in capsys.readouterr().out


def test_what_the_bundled_models_weights_are_is_said(pair, tmp_path, capsys, monkeypatch):
    """Beside spectra and small differences, since its weights were 4 bits each."""
    from luthier.checkpoint import bundled

    assert "Q4_1" in bundled.NOTES["smollm2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "MODELS", {"smollm2": lambda: tmp_path / "old"})
    (tmp_path / "book.txt").write_text("".join(f"the fox jumps over {i} dogs\n" for i in range(60)))
    said = {}
    for name in ("smollm2", "old"):
        for words in (["diff", name, str(pair[1]), "--no-rank"],
                      ["compare", name, str(pair[1]), "--data", "book.txt", "--items", "2"]):  # fmt: skip
            assert main(words) == 0
            said[name, words[0]] = bundled.NOTES["smollm2"] in capsys.readouterr().out
    assert said == {(n, verb): n == "smollm2" for n in ("smollm2", "old") for verb in ("diff", "compare")}


def test_what_does_not_match_is_listed(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = load_file(pair[1] / "model.safetensors")
    gone = tensors.pop("model.norm.weight")
    tensors["extra.weight"] = gone
    tensors[Q] = tensors[Q][:-1].contiguous()
    save_file(tensors, pair[1] / "model.safetensors", metadata={"format": "pt"})
    lines = unmatched(opened(pair[0]), opened(pair[1]))
    assert lines[:2] == ["only in the first: model.norm.weight", "only in the second: extra.weight"]
    assert lines[2].startswith(f"{Q} is [") and len(lines) == 3
    assert main(["diff", str(tmp_path / "old"), str(pair[1])]) == 0
    assert "only in the second: extra.weight" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (["diff", "old", "nowhere"], "no model 'nowhere'"),
    (["diff", "old", "new", "--picture", "no/x.svg"], "no such folder"),
])  # fmt: skip
def test_faults_are_one_line_and_leave_nothing(pair, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not list(tmp_path.glob("*.svg*"))
