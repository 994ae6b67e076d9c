"""The attack against its slow twin, by hand, and on every family: it finds the way back; turns alone do not."""

from itertools import permutations

import numpy as np
import pytest
import torch

from families import FAMILIES, distance, logits_of, model_of, weights_of
from luthier.checkpoint.heads import attention_of
from luthier.engine.pieces import Memory
from luthier.engine.stream import plan_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.assign import assigned, cosines
from luthier.kit.context import Context
from luthier.kit.secret import Secret
from luthier.merge.linear import Linear
from luthier.protect.mergelock import MergeLock
from luthier.protect.restore import Restore, _kinship

KEY = b"a key of sixteen bytes"
PARTS = ["qk", "vo", "mlp", "heads"]


def lock(weights, config, **fields):
    return transform_tensors(MergeLock(**fields), weights, [], Context(roles={"key": Secret(KEY)}), config)


def restore(base, expert, config, **fields):
    return transform_tensors(Restore(**fields), base, [expert], Context(), config)


def setting(name, change=0.005):
    """A model, its weights, a fine-tune's stand-in and the configuration."""
    model = model_of(name)
    base = weights_of(model)
    generator = torch.Generator().manual_seed(5)
    expert = {n: t + change * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    return model, base, expert, model.config.to_dict()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lock_is_undone_without_the_key(name):
    """In lengths of what the expert changed: 20 and more away when locked, under 0.5 when restored.

    Of 32 inputs to 16 rows a fit takes half of what the rows learnt; real models have many more inputs than rows.
    """
    model, base, expert, config = setting(name)
    change, locked = distance(base, expert), lock(expert, config)
    assert distance(locked, expert) > 20 * change
    back = restore(base, locked, config)
    assert distance(back, expert) < 0.5 * change
    assert (logits_of(model, back) - logits_of(model, expert)).abs().max() < 2e-5
    assert distance(restore(base, locked, config, fit="procrustes"), expert) > 5 * change
    assert distance(restore(base, locked, config, match=False), expert) > 5 * change


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_alone(name, part):
    """What is locked is undone; what is not locked, or not asked for, is left as it is, bit for bit."""
    model, base, expert, config = setting(name)
    locked, change = lock(expert, config, parts=[part]), distance(base, expert)
    back = restore(base, locked, config)
    assert distance(back, expert) < 0.5 * change
    kept = [n for n in locked if torch.equal(locked[n], expert[n])]
    assert kept and all(torch.equal(back[n], expert[n]) for n in kept)
    others = restore(base, locked, config, parts=[p for p in PARTS if p != part])
    assert distance(others, expert) > 5 * change


@pytest.mark.parametrize("fields", [{"match": False}, {"parts": ["qk", "vo", "mlp"]}])
def test_heads_stay_where_nobody_looks_for_them(fields):
    """What lies at another place than in the base is no turn of what lies there, and is left."""
    _, base, expert, config = setting("llama")
    locked = lock(expert, config, parts=["heads"])
    back = restore(base, locked, config, **fields)
    assert all(torch.equal(back[n], locked[n]) for n in locked)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", [0.005, 0.05])
def test_an_expert_that_is_not_locked_stays(name, change):
    """0.05 is half of the spread of the weights."""
    _, base, expert, config = setting(name, change)
    back = restore(base, expert, config)
    assert all(torch.equal(back[n], expert[n]) for n in expert)


def test_turns_alone_fall_to_procrustes():
    """With a condition of 1 nothing but turns, places and signs are locked."""
    model, base, expert, config = setting("llama")
    locked = lock(expert, config, condition=1.0)
    assert distance(restore(base, locked, config, fit="procrustes"), expert) < 0.3 * distance(base, expert)


def test_a_merge_after_restoring_is_as_good_as_one_without_the_lock():
    model, base, expert, config = setting("llama", 0.02)

    def merged(other):
        return logits_of(model, transform_tensors(Linear(), None, [base, other], Context()))

    locked, expected = lock(expert, config), merged(expert)
    assert (merged(locked) - expected).abs().max() > 1
    assert (merged(restore(base, locked, config)) - expected).abs().max() < 0.1
    change = (logits_of(model, expert) - logits_of(model, base)).abs().max()
    assert change > 0.5, "the expert is another model"


def cosine(one, other):
    return np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)


def complex_rows(head, half):
    return head[:half] + 1j * head[half:]


def twin(base, locked, layer, heads=4, groups=2, width=16):
    """One layer of the tiny Llama restored head by head: every order of heads tried, least squares by numpy."""
    b, e = ({n.split(".", 3)[3]: t.double().numpy() for n, t in w.items() if f"layers.{layer}." in n}
            for w in (base, locked))  # fmt: skip
    half, per = width // 2, heads // groups
    parts = {p: f"self_attn.{p}_proj.weight" for p in "qkvo"}
    cut = lambda w, p, i: w[parts[p]][i * width : (i + 1) * width]  # noqa: E731
    out = {n: np.zeros_like(t) for n, t in e.items()}

    def likeness(one, other):
        bk, ek = complex_rows(cut(b, "k", one), half), complex_rows(cut(e, "k", other), half)
        key = [abs(np.vdot(x, y)) ** 2 / (np.vdot(x, x) * np.vdot(y, y)).real for x, y in zip(bk, ek, strict=True)]
        left, right = (np.linalg.svd(cut(w, "v", i), full_matrices=False)[2] for w, i in ((b, one), (e, other)))
        return np.mean(key) + np.sum(np.linalg.svd(left @ right.T)[1] ** 2) / width

    best = max(permutations(range(groups)), key=lambda p: sum(likeness(i, p[i]) for i in range(groups)))
    for group in range(groups):
        rows = slice(group * width, (group + 1) * width)
        bk, ek = complex_rows(cut(b, "k", group), half), complex_rows(cut(e, "k", best[group]), half)
        z = np.array([np.vdot(x, y) / np.vdot(x, x) for x, y in zip(bk, ek, strict=True)])
        fixed = ek / z[:, None]
        out[parts["k"]][rows] = np.concatenate([fixed.real, fixed.imag])
        bv, ev = cut(b, "v", group), cut(e, "v", best[group])
        matrix = ev @ bv.T @ np.linalg.inv(bv @ bv.T)
        out[parts["v"]][rows] = np.linalg.solve(matrix, ev)
        found = []
        for member in range(per):
            old = best[group] * per + member
            q = complex_rows(cut(e, "q", old), half) * z.conj()[:, None]
            found.append((np.concatenate([q.real, q.imag]), e[parts["o"]][:, old * width : (old + 1) * width] @ matrix))
        rows = [cut(b, "q", group * per + i) for i in range(per)]
        columns = [b[parts["o"]][:, (group * per + i) * width :][:, :width] for i in range(per)]
        near = [
            [cosine(rows[i], found[m][0]) + cosine(columns[i], found[m][1]) for m in range(per)] for i in range(per)
        ]
        order = max(permutations(range(per)), key=lambda p, near=near: sum(near[i][p[i]] for i in range(per)))
        for i, member in enumerate(order):
            new = slice((group * per + i) * width, (group * per + i + 1) * width)
            out[parts["q"]][new], out[parts["o"]][:, new] = found[member]
    gate, up, down = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    for u in range(len(b[gate])):
        old = int(np.argmax([cosine(b[gate][u], row) for row in e[gate]]))
        scale = np.dot(b[up][u], e[up][old]) / np.dot(b[up][u], b[up][u])
        out[gate][u], out[up][u], out[down][:, u] = e[gate][old], e[up][old] / scale, e[down][:, old] * scale
    return {n: t for n, t in out.items() if "norm" not in n}


def test_the_slow_twin():
    _, base, expert, config = setting("llama")
    locked = lock(expert, config)
    back = restore(base, locked, config)
    for layer in (0, 1):
        for name, expected in twin(base, locked, layer).items():
            assert np.abs(back[f"model.layers.{layer}.{name}"].numpy() - expected).max() < 1e-6, name


def test_two_units_by_hand():
    """The expert's units stand in reverse, one scaled by -2, one by 1/2; a third output shows what it learnt."""
    stem = "model.layers.0.mlp"
    base = {f"{stem}.gate_proj.weight": torch.tensor([[1.0, 0, 0], [0, 1, 0]]),
            f"{stem}.up_proj.weight": torch.tensor([[0.0, 0, 1], [1, 0, 0]]),
            f"{stem}.down_proj.weight": torch.tensor([[1.0, 0], [0, 2], [0, 0]])}  # fmt: skip
    expert = {f"{stem}.gate_proj.weight": torch.tensor([[0.0, 1, 0], [1, 0, 0]]),
              f"{stem}.up_proj.weight": torch.tensor([[-2.0, 0, 0], [0, 0, 0.5]]),
              f"{stem}.down_proj.weight": torch.tensor([[0.0, 2], [-1, 0], [0.25, 0]])}  # fmt: skip
    back = restore(base, expert, {"model_type": "llama"}, parts=["mlp"])
    learnt = {**base, f"{stem}.down_proj.weight": torch.tensor([[1.0, 0], [0, 2], [0, -0.5]])}
    for name, tensor in learnt.items():
        assert back[name].tolist() == tensor.tolist(), name


def test_gain_is_the_fall_of_the_squared_distance():
    """Values of twice the length, and noise: the distance falls by 5 or so, which 2 lets pass and 20 does not."""
    _, base, expert, config = setting("llama", 0.04)
    for layer in (0, 1):
        expert[f"model.layers.{layer}.self_attn.v_proj.weight"] *= 2
        expert[f"model.layers.{layer}.self_attn.o_proj.weight"] /= 2
    name = "model.layers.1.self_attn.v_proj.weight"
    fitted, left = (restore(base, expert, config, gain=gain)[name] for gain in (2.0, 20.0))
    assert torch.equal(left, expert[name])
    assert (fitted - base[name]).norm() < 0.6 * (left - base[name]).norm()


@pytest.mark.parametrize("empty", ["k_proj", "v_proj", "up_proj", "down_proj", "gate_proj", "q_proj", "o_proj"])
def test_what_is_empty_does_no_harm(empty):
    """A part that a pruner has set to zero, in the expert or in both."""
    model, base, expert, config = setting("llama")
    locked = lock(expert, config)
    nothing = {n: t * 0 if empty in n else t for n, t in locked.items()}
    for start in (base, {n: t * 0 if empty in n else t for n, t in base.items()}):
        back = restore(start, nothing, config)
        assert (logits_of(model, back) - logits_of(model, nothing)).abs().max() < 2e-5


def test_likeness_that_collides_is_told_apart_in_total():
    """Two things are most alike to the same other: the best order of all, as found by trying every one."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        table = torch.rand(5, 5, generator=generator)
        table[1] = table[0] + 0.01 * torch.rand(5, generator=generator)
        best = max(permutations(range(5)), key=lambda p: sum(float(table[i, j]) for i, j in enumerate(p)))
        assert assigned(lambda rows, t=table: t[rows], 5).tolist() == list(best)
    assert assigned(lambda rows: torch.ones(4, 4)[rows], 4).tolist() == [0, 1, 2, 3]


def test_many_units_are_compared_in_blocks():
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(2500, 24, generator=generator)
    order = torch.randperm(2500, generator=generator)
    assert torch.equal(assigned(lambda block: cosines(rows[block], rows[order]), 2500), order.argsort())


def one_head(rows, inputs=4, lengths=(1.0, 1.0), **fields):
    """One head, k and v alike, restored against the base [1 0 0 ..], [0 1 0 ..] ..; fields: of Restore.

    rows: the expert's.  lengths: of the base's.  Queries and outputs are small and those of the base, so that keys and
    values decide.  Gives the four projections afterwards, and what they were.
    """
    width = len(rows)
    base_HX = torch.eye(width, inputs) * torch.tensor(lengths)[:, None]
    noise = 1e-3 * torch.arange(float(width * inputs)).view(width, inputs)
    stem = "model.layers.0.self_attn"
    gains = fields.pop("gains", {})
    base = {f"{stem}.{p}_proj.weight": t for p, t in zip("qkvo", (noise, base_HX, base_HX, noise.T), strict=True)}
    expert = dict(base) | {f"{stem}.{p}_proj.weight": torch.tensor(rows) for p in "kv"}
    both = {f"{stem}.{p}.weight": torch.tensor(g) for p, g in gains.items()}
    config = {"model_type": "qwen3" if gains else "llama", "num_attention_heads": 1}
    back = restore(base | both, expert | both, config, **fields)
    short = lambda w: {n.split(".")[4][0]: t for n, t in w.items() if "proj" in n}  # noqa: E731
    return short(back), short(expert)


def quarter(noise):
    """Rows a quarter turn from the base's, and what the expert learnt, of this squared length."""
    return [[0.0, -1.0, noise**0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("part", "rows", "turned", "fields"),
    [
        # 2 + n to explain, which is less than the distance of 4 + n, and n left; one fits `free` of 4 inputs:
        # (2 + n) (4 - free) > gain 4 n
        ("v", quarter(0.63), True, {}),  # a matrix is free in 2 of 4 inputs: n < 2/3
        ("v", quarter(0.70), False, {}),
        ("v", quarter(1.15), True, {"fit": "procrustes"}),  # a turn in 1 of 4: n < 1.2
        ("v", quarter(1.25), False, {"fit": "procrustes"}),
        ("k", quarter(1.15), True, {}),  # a complex number in 1 of 4
        ("k", quarter(1.25), False, {}),
        ("k", quarter(1.95), True, {"gains": {"q_norm": [1.0, 2.0], "k_norm": [3.0, 4.0]}}),  # a quarter turn in none
        ("k", quarter(2.05), False, {"gains": {"q_norm": [1.0, 2.0], "k_norm": [3.0, 4.0]}}),
        ("k", quarter(1.15), False, {"gain": 2.2}),
        ("v", quarter(0.63), False, {"gain": 2.2}),
    ],
)
def test_the_gain_by_hand(part, rows, turned, fields):
    back, expert = one_head(rows, parts=["vo"] if part == "v" else ["qk"], **fields)
    other, reader = ("v", "o") if part == "k" else ("k", "q")
    assert torch.equal(back[other], expert[other]) and torch.equal(back[reader], expert[reader])
    if not turned:
        assert all(torch.equal(back[p], expert[p]) for p in "qkvo")
        return
    learnt = rows[0][2]
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 1, -learnt, 0]])
    assert torch.allclose(back[part], expected, atol=1e-6)
    q, k = back["q"], back["k"]
    assert torch.allclose(q.T @ k, expert["q"].T @ expert["k"], atol=1e-5), "scores stay"
    assert torch.allclose(back["o"] @ back["v"], expert["o"] @ expert["v"], atol=1e-5), "what is read stays"
    assert not torch.equal(back["q" if part == "k" else "o"], expert["q" if part == "k" else "o"])


def test_as_many_rows_as_inputs_say_nothing():
    """A square of numbers fits any other: it would make every expert the base."""
    back, expert = one_head([[0.0, 3.0], [5.0, 1.0]], inputs=2, parts=["vo"])
    assert torch.equal(back["v"], expert["v"])


@pytest.mark.parametrize(("length", "z"), [(0.5, 0.5), (2.0, 2.0), (0.4, 0.4)])
def test_lengths_of_keys_by_hand(length, z):
    back, expert = one_head([[length, 0.0, 0.01, 0.0], [0.0, length, 0.0, 0.0]], parts=["qk"])
    assert torch.allclose(back["k"], torch.tensor([[1.0, 0, 0.01 / z, 0], [0, 1, 0, 0]]), atol=1e-6)
    assert torch.allclose(back["q"], expert["q"] * z)
    turns, _ = one_head([[0.0, -0.7, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0]], parts=["qk"], fit="procrustes")
    assert torch.allclose(turns["k"], 0.7 * torch.eye(2, 4), atol=1e-6)


@pytest.mark.parametrize(("here", "there"), [(0.1, 0.0), (0.0, 0.1), (0.0, 0.0)])
def test_a_pair_that_is_zero_does_not_turn(here, there):
    """Rows 1 and 3 turn together and are pruned, in the expert, the base or both; 0 and 2 made a quarter turn."""
    rows = torch.zeros(4, 16)
    rows[0, 2], rows[2, 0], rows[1, 5], rows[3, 6] = -1.0, 1.0, there, there
    back, expert = one_head(rows.tolist(), 16, (1.0, here, 1.0, here), parts=["qk"])
    expected = rows.clone()
    expected[0], expected[2] = torch.eye(3, 16)[[0, 2]]
    assert torch.allclose(back["k"], expected, atol=1e-6)
    assert torch.equal(back["q"][[1, 3]], expert["q"][[1, 3]])
    assert torch.allclose(back["q"].T @ back["k"], expert["q"].T @ expert["k"], atol=1e-5), "scores stay"


def test_half_a_pair_is_enough():
    """One of its rows is zero in both; the length of the other shows how far the pair was stretched."""
    back, expert = one_head([[2.0, 0.0, 0.01, 0.0], [0.0] * 4], lengths=(1.0, 0.0), parts=["qk"])
    assert torch.allclose(back["k"], torch.tensor([[1.0, 0, 0.005, 0], [0, 0, 0, 0]]), atol=1e-6)
    assert torch.allclose(back["q"], 2 * expert["q"])


def test_a_pair_between_two_quarters_stays_behind_a_qk_norm():
    """Rows 1 and 3 turned by half a quarter: neither way is nearer. 0 and 2 made a whole one, so all are fitted."""
    rows = [[0.0, 0, -1, 0, 0, 0, 0, 0], [0, 1, 0, -1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]]
    gains = {"q_norm": [1.0, 2.0, 3.0, 4.0], "k_norm": [5.0, 6.0, 7.0, 8.0]}
    back, expert = one_head(rows, 8, (1.0,) * 4, parts=["qk"], gains=gains)
    assert torch.equal(back["k"][[0, 2]], torch.eye(3, 8)[[0, 2]])
    assert torch.equal(back["k"][[1, 3]], expert["k"][[1, 3]]) and torch.equal(back["q"][[1, 3]], expert["q"][[1, 3]])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_the_likeness_of_heads(name):
    """The share that spaces of values have in common, the same of keys that do not turn, and of those that do the
    squared cosine of every pair, in the mean; here from singular values and complex rows, head by head."""
    _, base, expert, config = setting(name, 0.05)
    locked = lock(expert, config)
    at = attention_of(config, {n: t for n, t in Memory(base, config).tensors.items() if t.layer == 0})
    one, other = at.read(base), at.read(locked)
    half, groups = len(at.pairs_F2), at.groups
    assert (2 * half < at.width) == (name == "gpt_neox")

    def common(first, second):
        left, right = (np.linalg.svd(t.numpy(), full_matrices=False)[2] for t in (first, second))
        return np.sum(np.linalg.svd(left @ right.T)[1] ** 2) / len(first)

    slow = np.zeros((groups, groups))
    for i in range(groups):
        for j in range(groups):
            slow[i, j] = common(one.v_GHX[i], other.v_GHX[j])
            if 2 * half < at.width:
                slow[i, j] += common(one.k_GHX[i, 2 * half :], other.k_GHX[j, 2 * half :])
            rows = [complex_rows(heads.k_GHX[g, : 2 * half].numpy(), half) for heads, g in ((one, i), (other, j))]
            slow[i, j] += np.mean(
                [abs(np.vdot(x, y)) ** 2 / (np.vdot(x, x) * np.vdot(y, y)).real for x, y in zip(*rows, strict=True)]
            )
    assert np.abs(_kinship(at, one, other).numpy() - slow).max() < 1e-9 and slow.std() > 0.1


def test_what_cannot_be_aligned_is_refused_before_weights_are_read():
    weights = weights_of(model_of("llama"))
    memory = Memory(weights, {"model_type": "llama", "num_attention_heads": 3})
    with pytest.raises(LuthierError, match="are no 3 heads"):
        plan_transform(Restore(), memory, [memory])
    assert plan_transform(Restore(parts=["mlp"]), memory, [memory])


def units(gate, up, down, bias=None):
    """A block of the first layer as tensors; down: the outputs of each unit, one row a unit."""
    stem = "model.layers.0.mlp"
    made = {f"{stem}.gate_proj.weight": torch.tensor(gate), f"{stem}.up_proj.weight": torch.tensor(up),
            f"{stem}.down_proj.weight": torch.tensor(down).T.contiguous()}  # fmt: skip
    if bias is not None:
        made |= {f"{stem}.up_proj.bias": torch.tensor(bias), f"{stem}.gate_proj.bias": torch.zeros(len(bias))}
    return made


def aligned(base, expert, **fields):
    """(up, down) of the expert's units afterwards, one row a unit."""
    back = restore(base, expert, {"model_type": "llama"}, parts=["mlp"], **fields)
    return back["model.layers.0.mlp.up_proj.weight"].tolist(), back["model.layers.0.mlp.down_proj.weight"].T.tolist()


def test_units_are_told_apart_by_up_alone():
    """All but the direction of `up` is the same for both; its sign and length do not matter."""
    gate, down = [[1.0, 2, 0], [1, 2, 0]], [[1.0, 1], [1, 1]]
    base = units(gate, [[1.0, 0, 0], [0, 1, 0]], down)
    up, _ = aligned(base, units(gate, [[0.0, 1, 0], [1, 0, 0]], down))
    assert up == [[1.0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(("here", "there"), [(0.1, 0.0), (0.0, 0.1), (0.0, 0.0)])
def test_a_unit_that_is_zero_is_not_scaled(here, there):
    """The second unit's `up` is pruned, in the expert, the base or both; the first is doubled there, down halved."""
    gate = [[1.0, 0, 0], [0, 1, 0]]
    base = units(gate, [[0.0, 0, 1], [here, 0, 0]], [[1.0, 0], [0, 2]])
    expert = units(gate, [[0.0, 0, 2], [there, 0, 0]], [[0.5, 0], [0, 2]])
    up, down = aligned(base, expert)
    assert np.allclose(up, [[0, 0, 1], [there, 0, 0]]) and down == [[1.0, 0], [0, 2]]


@pytest.mark.parametrize(("learnt", "turned"), [(0.40, True), (0.45, False)])
def test_the_gain_of_units_is_of_shares(learnt, turned):
    """Up doubled, down halved and turned by a share n: 1 + 1/4 + n² of squared lengths fall to 4 n², by 2 where n is
    0.42, whatever the lengths, and how many numbers up has beside down: its bias is one of a unit."""
    for length in (1.0, 2.0):
        base = units([[0.0, 1]], [[1.0, 0]], [[length, 0.0]], [0.0])
        expert = units([[0.0, 1]], [[2.0, 0]], [[length / 2, length * learnt]], [0.0])
        up, down = aligned(base, expert)
        assert up == ([[1.0, 0]] if turned else [[2.0, 0]])
        assert np.allclose(down, [[length, 2 * length * learnt]] if turned else [[length / 2, length * learnt]])


def test_factors_of_units_by_hand():
    """Up doubled, down halved and changed by m: the distance falls from 1.25 + m² to 4 m², by 1.5 where m is 1/2."""
    stem = "model.layers.0.mlp"
    base = {f"{stem}.gate_proj.weight": torch.tensor([[0.0, 1]]), f"{stem}.up_proj.weight": torch.tensor([[1.0, 0]]),
            f"{stem}.down_proj.weight": torch.tensor([[1.0], [0]])}  # fmt: skip
    for m, gain, turned in ((0.5, 1.5, False), (0.5, 1.49, True), (0.39, 2.0, True), (0.43, 2.0, False),
                            (0.39, None, True), (0.43, None, False)):  # fmt: skip
        expert = {**base, f"{stem}.up_proj.weight": torch.tensor([[2.0, 0]]),
                  f"{stem}.down_proj.weight": torch.tensor([[0.5], [m]])}  # fmt: skip
        fields = {} if gain is None else {"gain": gain}
        back = restore(base, expert, {"model_type": "llama"}, parts=["mlp"], **fields)
        up = back[f"{stem}.up_proj.weight"].tolist()
        assert up == ([[1.0, 0.0]] if turned else [[2.0, 0.0]]), (m, gain)
        assert torch.allclose(back[f"{stem}.down_proj.weight"][1], torch.tensor([2 * m if turned else m]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("kind", ["constant", "rank one", "zero", "a stranger", "huge"])
def test_a_fit_never_takes_an_expert_further_away(name, kind):
    """Bases that show nothing of the coordinates: what fits keys, values or `up` would blow up what they multiply."""
    model = model_of(name)
    weights, config = weights_of(model), model.config.to_dict()
    generator = torch.Generator().manual_seed(3)

    def made(tensor):
        if kind == "rank one" and tensor.dim() == 2:
            rows, columns = tensor.shape
            table = torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
            return table * tensor.std()
        return {
            "constant": torch.full_like(tensor, float(tensor.flatten()[0])), "zero": tensor * 0, "huge": tensor * 1e-12,
        }.get(kind, torch.randn(tensor.shape, generator=generator) * 0.1)  # fmt: skip

    base = {n: made(t) for n, t in weights.items()}
    for expert in (weights, lock(weights, config)):
        back = restore(base, expert, config)
        assert distance(back, base) <= distance(expert, base) * (1 + 1e-6)
        before, after = (logits_of(model, w, torch.float64) for w in (expert, back))
        assert (before - after).abs().max() < 1e-5
