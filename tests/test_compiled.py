"""Compiled kernels change no byte: every merge they serve, with them and without, and each kernel by itself."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.catalogue import load
from luthier.checkpoint.reader import Checkpoint
from luthier.engine.held import Memory, Stored
from luthier.engine.stream import run_transform
from luthier.errors import LuthierError
from luthier.flows import Piece
from luthier.kit import compiled
from luthier.kit.context import Context
from luthier.kit.noise import ALL, below
from luthier.kit.sieve import least, magnitudes

FORMS = [
    ("merge.linear", {}), ("merge.linear", {"weights": (0.3, 0.5, -0.1), "normalize": False}),
    ("merge.task_arithmetic", {"scale": 0.3}),
    ("merge.ties", {"density": 0.4}),
    ("merge.ties", {"density": 0.4, "scope": "tensor", "on_tie": "plus", "scale": 0.7}),
    ("merge.ties", {"density": 1.0, "weights": (0.5, 0.5, 0.5)}), ("merge.ties", {"weights": (0.2, -0.5, 0.9)}),
    ("merge.ties", {"density": 0.6, "normalize": False}), ("merge.ties", {"density": 0.0}),
    ("merge.dare", {"density": 0.5}), ("merge.dare", {"density": 0.5, "vote": "plus", "rescale": "l1"}),
    ("merge.dare", {"density": 0.5, "vote": "majority", "normalize": True}),
    ("merge.breadcrumbs", {"density": 0.5, "gamma": 0.05, "scope": "tensor", "vote": "plus"}),
    ("merge.breadcrumbs", {"density": 0.5, "gamma": 0.05}),
    ("merge.della", {"density": 0.5, "epsilon": 0.1, "vote": "plus"}),
    ("merge.cabs", {}), ("merge.pcb", {}), ("merge.model_stock", {}),
]  # fmt: skip


KERNELS = {
    "philox", "below", "finite", "difference", "accumulate", "shifted", "weigh", "thin", "agree", "elected", "masses",
    "votes", "voted", "added", "magnitudes",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three fine-tunes in bfloat16, whose changes repeat, cancel and have zeros of both signs."""
    at, gen = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (301, 40), "model.layers.0.mlp.up_proj.weight": (133, 520),
        "model.norm.weight": (40,),
    }  # fmt: skip
    base = {n: (torch.randn(s, generator=gen) * 0.02).bfloat16() for n, s in shapes.items()}
    for tensor in base.values():
        tensor.view(-1)[::7] = 0.0
        tensor.view(-1)[1::7] = -0.0
    found = []
    for number in range(4):
        made = {}
        for name, tensor in base.items():
            moved = (torch.randn(tensor.shape, generator=gen) * 1e-3).bfloat16() if number else torch.zeros_like(tensor)
            moved.view(-1)[::5] = (number % 2 - 0.5) * 2e-3 if number < 3 else 0.0
            made[name] = torch.where(tensor == 0, tensor, tensor + moved) if number == 1 else tensor + moved
        (folder := at / f"m{number}").mkdir()
        save_file(made, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
        found.append(folder)
    return found


@pytest.fixture
def used(monkeypatch):
    """How often each kernel ran."""
    import luthier.kit.kernels as kernels

    counts: dict[str, int] = {}

    def counted(name, kernel):
        def run(*args):
            counts[name] = counts.get(name, 0) + 1
            return kernel(*args)

        return run

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return counts


def merged(form, folders, out, threads=1):
    use, fields = form
    base, *experts = map(Checkpoint.open, folders)
    base = None if use == "merge.linear" else base
    run_transform(load(use, **fields), base, experts, out, Context(seed=3), threads=threads)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{len(form[1])}")
def test_the_same_bytes(form, folders, tmp_path, monkeypatch, used):
    plain = merged(form, folders, tmp_path / "plain")
    assert not used  # so few entries are not worth it
    monkeypatch.setattr(compiled, "LEAST", 0)
    assert merged(form, folders, tmp_path / "one") == plain
    assert merged(form, folders, tmp_path / "three", threads=3) == plain
    assert used["finite"] > 0


def test_every_kernel_is_used(folders, tmp_path, monkeypatch, used):
    monkeypatch.setattr(compiled, "LEAST", 0)
    for number, form in enumerate(FORMS):
        merged(form, folders, tmp_path / str(number))
    assert set(used) == KERNELS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_go_torchs_way(dtype, folders, tmp_path, monkeypatch, used):
    """Only bfloat16 is read as bits; the vote of fp32 changes is compiled all the same."""
    others = []
    for folder in folders:
        (other := tmp_path / folder.name).mkdir()
        save_file({n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()},
                  other / "model.safetensors", {"format": "pt"})  # fmt: skip
        (other / "config.json").write_text((folder / "config.json").read_text())
        others.append(other)
    plain = merged(FORMS[3], others, tmp_path / "plain")
    monkeypatch.setattr(compiled, "LEAST", 0)
    assert merged(FORMS[3], others, tmp_path / "compiled") == plain
    assert "finite" not in used and used["elected"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LEAST", 0)
    (bad := tmp_path / "bad").mkdir()
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["model.norm.weight"][39] = value
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    (bad / "config.json").write_text((folders[1] / "config.json").read_text())
    with pytest.raises(LuthierError, match=r"bad.*model\.norm\.weight.*1 of 40 values are NaN or infinite"):
        merged(FORMS[3], [folders[0], bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_largest_finite_value_is_finite(monkeypatch):
    import luthier.kit.kernels as kernels

    most = torch.tensor([torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16)
    assert kernels.finite(compiled.flat(most))


@pytest.mark.parametrize("keep", [[5, 5, 5], [5, 0, 63], [1, 64, 2], [0, 0, 0]])
def test_least_magnitudes_are_those_of_a_sort(keep, monkeypatch):
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    values[:, ::3] = values[0, ::3]  # where nobody moved
    info = Memory({"w": values[0]}).tensors["w"]
    whole = values.float()
    wanted = [
        math.inf if k == 0 else float((whole[n + 1] - whole[0]).abs().sort(descending=True).values[k - 1])
        for n, k in enumerate(keep)
    ]
    plain = Piece("w", "other", (64,), None, 0, whole[0], tuple(whole[1:]))
    assert least(plain, keep) == wanted
    monkeypatch.setattr(compiled, "LEAST", 0)
    with compiled.worth(0, 0, torch.device("cpu")):
        stored = Stored(info, False, 0, [compiled.flat(v) for v in values], 0, None)
        assert least(stored, keep) == wanted
        pairs = zip(magnitudes(stored), magnitudes(plain), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_without_numba_torch_does_it(folders, tmp_path, monkeypatch, used):
    plain = merged(FORMS[3], folders, tmp_path / "plain")
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setitem(sys.modules, "luthier.kit.kernels", None)
    assert merged(FORMS[3], folders, tmp_path / "out") == plain and not used


def test_kernels_last_as_long_as_the_merge(monkeypatch):
    monkeypatch.setattr(compiled, "LEAST", 100)
    cpu = torch.device("cpu")
    with compiled.worth(99, compiled.MANY - 1, cpu):
        assert compiled.kernels() is None
    with compiled.worth(1000, compiled.MANY, torch.device("meta")):
        assert compiled.kernels() is None
    with compiled.worth(99, compiled.MANY, cpu):
        assert compiled.kernels() is not None
    with pytest.raises(ZeroDivisionError), compiled.worth(100, 1, cpu):
        assert compiled.kernels() is not None
        raise ZeroDivisionError
    assert compiled.kernels() is None


def test_draws_are_the_same(monkeypatch):
    """Any stretch and share; where a 16-bit word equals the bound's upper half, the second stream decides."""
    draw, cases = random.Random(0), []
    for number in range(60):
        bounds = draw.randrange(ALL) if number % 3 else draw.randrange(3) << 16 | draw.randrange(1 << 16)
        cases.append((draw.randrange(1 << 63), draw.randrange(1 << 36) * 16, draw.randrange(1, 70_000), bounds))
    cases += [(7, 0, 1 << 20, 1234 << 16 | 1 << 15), (7, 5, 1000, 1 << 31), (7, 0, 100, 0), (7, 0, 100, ALL - 1)]
    plain = [below(*case) for case in cases]
    monkeypatch.setattr(compiled, "LEAST", 0)
    with compiled.worth(1, 1, torch.device("cpu")):
        for case, found in zip(cases, plain, strict=True):
            made = below(*case)
            assert made.dtype == bool and np.array_equal(made, found)


def test_a_stored_piece_is_a_piece():
    """fp32 values are made once, when asked for; the shape is known without them."""

    class Info:
        name, role, shape, depth = "w", "other", (4, 3), 0.5

    values = torch.randn(3, 6).bfloat16()
    bits = [v.view(torch.uint16).numpy() for v in values[[1, 0, 2]]]
    stored = Stored(Info, True, 6, bits, 1, (0, 2))
    plain = Piece(
        "w", "other", (4, 3), 0.5, 6, values[0].float().view(2, 3), tuple(values[1:].float().view(2, 2, 3)), (0, 2)
    )
    assert stored.seen == plain.seen == (2, 3) and stored.count == plain.count == 2
    assert torch.equal(stored.base, plain.base) and stored.experts is stored.experts
    assert all(torch.equal(a, b) for a, b in zip(stored.experts, plain.experts, strict=True))
    assert stored.experts[-1] is stored.experts[1] and torch.equal(stored.experts[:1][0], plain.experts[0])
    assert (stored.name, stored.which, stored.start, stored.depth) == (
        plain.name,
        plain.which,
        plain.start,
        plain.depth,
    )
    assert Stored(Info, False, 0, bits, None, None).base is None
    with pytest.raises(IndexError):
        stored.experts[2]


def test_flat_shares_memory():
    values = torch.zeros(2, 3)
    compiled.flat(values)[4] = 5.0
    assert values[1, 1] == 5 and compiled.flat(torch.zeros(2, dtype=torch.bfloat16)).dtype == np.uint16
    with pytest.raises(RuntimeError):
        compiled.flat(values.T)
