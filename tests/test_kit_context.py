"""Keyed randomness, events and the cache of a context; schedules over depth and names."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.schedule import at


def drawn(ctx, *item):
    return torch.rand(4, generator=ctx.rng(*item)).tolist()


def test_randomness_is_decided_by_its_key():
    ctx = Context(seed=1, step="a")
    torch.manual_seed(5)
    first = drawn(ctx, "x", 3)
    torch.manual_seed(6)
    assert drawn(Context(seed=1, step="a"), "x", 3) == first
    others = [drawn(ctx, "x", 4), drawn(ctx, "x"), drawn(ctx.with_(seed=2), "x", 3), drawn(ctx.with_(step="b"), "x", 3)]
    assert first not in others and len({tuple(o) for o in others}) == 4
    assert drawn(ctx, "ab", "c") != drawn(ctx, "a", "bc")


def test_randomness_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn(Context(), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_are_the_same_in_every_thread_and_process():
    """The numbers themselves are pinned: a change would change every recipe's result."""
    assert Context(seed=0, step="math").key("init", "w") == 7107392187478358341
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: Context(seed=3).key("x"), range(8)))) == 1
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(Context(seed=3).key, ("x",)) == Context(seed=3).key("x")


@given(st.integers(), st.text(), st.lists(st.integers() | st.text() | st.none()))
def test_keys_fit_a_generator(seed, step, item):
    ctx = Context(seed=seed, step=step)
    assert 0 <= ctx.key(*item) < 2**63
    ctx.rng(*item)


def test_events_reach_whoever_watches():
    seen = []
    ctx = Context(step="s", watch=seen.append)
    assert list(ctx.progress("ab", what="letters")) == ["a", "b"]
    assert list(ctx.progress(iter("a"), total=5)) == ["a"]
    ctx.emit("metrics", loss=1.5)
    assert seen[0] == {"kind": "progress", "step": "s", "what": "letters", "done": 0, "total": 2}
    assert seen[2] == {"kind": "progress", "step": "s", "what": "letters", "done": 2, "total": 2}
    assert seen[3]["total"] == 5
    assert seen[-1] == {"kind": "metrics", "step": "s", "loss": 1.5}
    Context().emit("metrics", loss=1)
    assert Context(roles={"paired_to": "a"}).role("paired_to") == "a"
    assert Context().role("paired_to", "b") == "b"


def test_the_cache_makes_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(6).reshape(2, 3).T}

    ctx = Context(cache=tmp_path / "cache")
    first, again = (ctx.cached("mask", {"share": 0.05}, make) for _ in range(2))
    assert torch.equal(first["x"], again["x"]) and len(made) == 1
    ctx.with_(seed=9, step="other").cached("mask", {"share": 0.05}, make)
    assert len(made) == 1
    ctx.cached("mask", {"share": 0.06}, make)
    ctx.cached("other", {"share": 0.05}, make)
    assert len(made) == 3
    Context().cached("mask", {"share": 0.05}, make)
    assert len(made) == 4
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".safetensors" or p.name[0] == "."]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Context(cache=tmp_path / "file" / "cache").cached("mask", {}, lambda: {"x": torch.ones(2)})
    assert kept["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("schedule", "name", "depth", "value"),
    [
        (0.5, "any", None, 0.5),
        ((0.0, 1.0), "layers.0.w", 0.0, 0.0),
        ((0.0, 1.0), "layers.9.w", 1.0, 1.0),
        ((0.0, 1.0), "layers.3.w", 0.25, 0.25),
        ((0.0, 1.0, 0.0), "layers.3.w", 0.75, 0.5),
        ((3.0,), "layers.3.w", 0.4, 3.0),
        ((0.0, 1.0), "model.embed_tokens.weight", None, 0.0),
        ((0.0, 1.0), "lm_head.weight", None, 1.0),
        ({"*": 1.0, "*.mlp.*": 0.25}, "layers.1.mlp.up", 0.5, 0.25),
        ({"*.mlp.*": 0.25, "*": 1.0}, "layers.1.mlp.up", 0.5, 1.0),
        ({"*": (0.0, 1.0)}, "layers.1.mlp.up", 0.5, 0.5),
    ],
)
def test_schedules(schedule, name, depth, value):
    assert at(schedule, name, depth) == pytest.approx(value)


def test_a_name_that_no_pattern_matches():
    with pytest.raises(LuthierError, match="no pattern matches 'x'; add a pattern"):
        at({"y*": 1.0}, "x", None)


@given(st.lists(st.floats(-10, 10), min_size=1), st.floats(0, 1))
def test_a_list_stays_between_its_values(values, depth):
    assert min(values) - 1e-9 <= at(tuple(values), "layers.w", depth) <= max(values) + 1e-9
