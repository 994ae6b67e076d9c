"""Saves of a run: trees come back as they were, damage is found, nothing half written stays."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import saved
from luthier.errors import LuthierError

CPU = torch.device("cpu")
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=25, deadline=None)
@given(tree=TREES)
def test_trees_come_back_equal(tmp_path_factory, tree):
    place = saved.save(tmp_path_factory.mktemp("s"), 1, {"tree": tree}, keep=1)
    assert same(saved.read(place, CPU), {"tree": tree})


def test_tensors_of_every_kind_come_back(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tree = {
        "state": [{"step": torch.tensor(3.0), "m": whole.bfloat16()}, {}],
        "view": whole[1:, ::2], "whole": whole, "part": whole[0], "index": torch.tensor([1, 5], dtype=torch.int32),
        "none": torch.zeros(0), "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "bools": torch.tensor([True]),
    }  # fmt: skip
    place = saved.save(tmp_path, 7, tree, keep=1)
    assert same(saved.read(place, CPU), tree)
    assert sorted(p.name for p in place.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]


def test_what_is_read_does_not_hang_on_the_file(tmp_path):
    place = saved.save(tmp_path, 1, {"x": torch.ones(1000)}, keep=1)
    tree = saved.read(place, CPU)
    with (place / saved.TENSORS).open("r+b") as file:
        file.truncate(10)
    assert tree["x"].sum() == 1000


def damage_flip(place):
    path = place / saved.TENSORS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def damage_cut(place):
    path = place / saved.TENSORS
    path.write_bytes(path.read_bytes()[:-8])


def damage_tree(place):
    (place / saved.TREE).write_text('{"dict": []}')


def damage_manifest(place):
    (place / saved.MANIFEST).unlink()


def damage_names(place):
    (place / saved.MANIFEST).write_text(json.dumps({}))


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_tree, damage_manifest, damage_names])
def test_damage_is_found_and_an_older_save_taken(tmp_path, damage):
    for step in (9, 10, 11):
        saved.save(tmp_path, step, {"x": torch.full((8,), float(step))}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    damage(tmp_path / "step-00000011")
    place, broken = saved.newest(tmp_path)
    assert place == tmp_path / "step-00000010" and broken == [tmp_path / "step-00000011"]
    saved.save(tmp_path, 11, {"x": torch.zeros(8)}, keep=2)
    assert saved.newest(tmp_path) == (tmp_path / "step-00000011", [])


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path):
    """The system refuses to let a file grow, as it does on a full disk."""
    saved.save(tmp_path, 1, {"x": torch.ones(8)}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(LuthierError) as fault:
            saved.save(tmp_path, 2, {"x": torch.ones(1 << 16)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 2 could not be saved" in str(fault.value) and "\n" not in str(fault.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert saved.newest(tmp_path) == (tmp_path / "step-00000001", [])


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(LuthierError, match="/optimizer/0/x: the state holds a set"):
        saved.save(tmp_path, 1, {"optimizer": [{"x": {1}}]}, keep=1)
    with pytest.raises(LuthierError, match="/x: the state holds nan"):
        saved.save(tmp_path, 1, {"x": float("nan")}, keep=1)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_save_go(tmp_path):
    (tmp_path / ".step-00000003.part").mkdir()
    (tmp_path / ".step-00000003.part" / saved.TENSORS).write_bytes(b"half")
    assert saved.newest(tmp_path) == (None, [])
    saved.save(tmp_path, 1, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    saved.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_newer_save_does_not_push_out_the_good_ones(tmp_path):
    """A training that passed it over goes on below it: what it saves must stay, and the damaged one go."""
    for step in (10, 12):
        saved.save(tmp_path, step, {"x": torch.ones(2)}, keep=2)
    (tmp_path / "step-00000012" / saved.MANIFEST).unlink()
    saved.save(tmp_path, 11, {"x": torch.zeros(2)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000011"]
    place, broken = saved.newest(tmp_path)
    assert place and place.name == "step-00000011" and broken == []
