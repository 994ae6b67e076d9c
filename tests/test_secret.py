"""Keys: what is drawn from one, where they may come from, and that they are left nowhere."""

import hashlib
import json

import pytest
import torch

from luthier.checkpoint.reader import Checkpoint
from luthier.errors import LuthierError
from luthier.kit.secret import Secret
from luthier.protect.mergelock import ENTRY, MergeLock
from luthier.protect.restore import Restore
from luthier.recipe_run import run
from luthier.report import summary
from luthier.testing import tiny

KEY = b"no word of this may be written down"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a model, an expert and a key."""
    monkeypatch.chdir(tmp_path)
    base = tiny.checkpoint(tmp_path / "base")
    tiny.expert_of(base, 1, tmp_path / "expert", scale=0.01)
    (tmp_path / "secret.key").write_bytes(KEY)
    return tmp_path


def test_numbers_are_those_of_the_definition():
    key = hashlib.blake2b(KEY, person=b"luthier key").digest()
    raw = hashlib.shake_256(key + b"a label").digest(24)
    words = [int.from_bytes(raw[i : i + 8], "little") % 2**62 for i in (0, 8, 16)]
    secret = Secret(KEY)
    assert secret.uniform("a label", 3).tolist() == [(w + 1) / 2**62 for w in words]
    assert secret.order("a label", 3).tolist() == sorted(range(3), key=lambda i: words[i])
    assert secret.fingerprint == hashlib.blake2b(key, digest_size=8, person=b"luthier finger").hexdigest()
    assert secret.order("none", 0).tolist() == []


def test_numbers_look_as_they_should():
    secret = Secret(KEY)
    uniform, normal = secret.uniform("u", 200, 100), secret.normal("n", 200, 100)
    assert 0 < uniform.min() < 0.001 and 0.999 < uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02 and normal.abs().max() > 3.5
    turns = secret.rotation("r", 50, 6, 6)
    assert torch.allclose(turns @ turns.transpose(1, 2), torch.eye(6).double().expand(50, 6, 6), atol=1e-12)
    assert turns.mean(0).abs().max() < 0.25
    factors = secret.spread("s", 10.0, 5000)
    assert 10**-0.5 <= factors.min() < 0.33 and 3 < factors.max() <= 10**0.5 and abs(factors.log().mean()) < 0.03
    assert not torch.equal(secret.uniform("u", 5), secret.uniform("v", 5))


def test_a_secret_does_not_show():
    import copy
    import pickle

    secret = Secret(KEY)
    assert "no word" not in f"{secret} {secret!r}" and secret.fingerprint in repr(secret)
    for write in (pickle.dumps, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            write(secret)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such key file"), (b"short", "5 bytes"), (b"x" * 2**21, "2,097,152")]
)
def test_files_that_are_no_keys(there, content, says):
    if content is not None:
        (there / "other.key").write_bytes(content)
    with pytest.raises(LuthierError, match=says):
        Secret.read("other.key")


def recipe(**lock):
    return {
        "luthier": 1,
        "steps": {
            "locked": {"use": "protect.mergelock", "model": "expert", "key": "secret.key", **lock},
            "back": {"use": "protect.mergelock", "model": "locked", "key": "secret.key", "set": {"invert": True}},
            "broken": {"use": "protect.restore", "base": "base", "experts": "locked"},
            "merged": {"use": "merge.linear", "experts": ["base", "broken"]},
        },
    }


def weights(folder):
    return {n: t for n, t in Checkpoint.open(folder).items()}


def test_a_recipe_locks_unlocks_and_breaks(there):
    done = run(recipe(), folder="out")
    expert, locked, back, broken = (weights(p) for p in ("expert", *map(done.path, ("locked", "back", "broken"))))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (locked[name] - expert[name]).norm() > expert[name].norm()
    assert max((back[n] - expert[n]).abs().max() for n in expert) < 1e-6
    assert (broken[name] - expert[name]).norm() < 0.05 * expert[name].norm()
    record = done.record("locked")
    assert record.inputs["key"] == {"name": "secret.key", "hash": Secret(KEY).fingerprint}
    assert any("protect.restore" in note for note in record.notes)
    assert "What the lock does not stop" in (done.path("locked") / "README.md").read_text()
    assert any("protect.restore" in note for note in summary(done.folder).notes)
    assert run(recipe(), folder="out").kept == ("locked", "back", "broken", "merged")


@pytest.mark.parametrize(("id_", "step"), [
    ("compress.stitch", {"base": "locked", "set": {"layers": ["base.1"]}}),
    ("merge.linear", {"experts": ["locked", "base"], "set": {"weights": [0.9, 0.1]}}),
])  # fmt: skip
def test_no_key_undoes_what_was_cut_or_mixed_since(there, id_, step):
    """The secrets follow the places of layers: the right key would leave weights that are neither one's."""
    locked = recipe()["steps"]["locked"]
    changed = {"luthier": 1, "steps": {"locked": locked, "changed": {"use": id_, **step}}}
    changed["steps"]["back"] = {
        "use": "protect.mergelock", "model": "changed", "key": "secret.key", "set": {"invert": True}
    }  # fmt: skip
    with pytest.raises(LuthierError, match=f"locked with key .*, and {id_} has changed its weights since"):
        run(changed, folder="out")
    assert json.loads((there / "out" / "steps" / "changed" / "config.json").read_text())[ENTRY]["parts"]
    del changed["steps"]["back"]
    plain = run(changed, folder="out")
    assert plain.path("changed").is_dir()


def test_the_key_is_left_nowhere(there):
    run(recipe(), folder="out")
    (there / "secret.key").unlink()
    digests = {KEY.hex(), hashlib.sha256(KEY).hexdigest(), hashlib.blake2b(KEY, person=b"luthier key").hexdigest()}
    for path in there.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY not in content and not any(d.encode() in content for d in digests), path


def test_another_key_is_another_lock(there):
    run(recipe(), folder="out")
    (there / "secret.key").write_bytes(b"another key altogether")
    assert run(recipe(), folder="out").kept == ()


def test_wrong_and_missing_keys_end_before_anything_starts(there):
    done = run(recipe(), folder="out")
    (there / "other.key").write_bytes(b"another key altogether")
    step = {"use": "protect.mergelock", "model": str(done.path("locked")), "key": "other.key", "set": {"invert": True}}
    with pytest.raises(LuthierError, match="locked with key"):
        run({"luthier": 1, "steps": {"back": step}}, folder="other")
    assert not (there / "other" / "steps").exists() or not list((there / "other" / "steps").iterdir())
    for key, says in (("nowhere.key", "no such key file"), (["a", "b"], "takes one name"), ({"a": 1}, "takes a name"),
                      (7, "takes the path of a file")):  # fmt: skip
        with pytest.raises(LuthierError, match=says):
            run(recipe(key=key), folder="out2")
    with pytest.raises(LuthierError, match="lacks 'key'"):
        run({"luthier": 1, "steps": {"locked": {"use": "protect.mergelock", "model": "expert"}}}, folder="out3")
    with pytest.raises(LuthierError, match="takes 1 expert, and 2 are given"):
        step = {"use": "protect.restore", "base": "base", "experts": ["expert", "base"]}
        run({"luthier": 1, "steps": {"back": step}}, folder="out4")


def test_from_python(there):
    locked = MergeLock().apply(model="expert", key="secret.key")
    assert locked.plan().write_bytes == Checkpoint.open("expert").nbytes
    folder = locked.save("locked")
    assert Checkpoint.open(folder).config[ENTRY]["key"] == Secret(KEY).fingerprint
    card = (folder / "README.md").read_text()
    assert "key: secret.key" in card and "What the lock costs" in card
    back = MergeLock(invert=True).apply(model=folder, key=Secret(KEY)).save("back")
    assert ENTRY not in Checkpoint.open(back).config
    broken = Restore().apply(base="base", experts=folder).save("broken")
    assert ENTRY not in Checkpoint.open(broken).config
    with pytest.raises(LuthierError, match="'key' is missing"):
        MergeLock().apply(model="expert")
