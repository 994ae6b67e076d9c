"""From names to checkpoints, and the hash that stands for a checkpoint's content."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from luthier.checkpoint.cache import cache_folder, locked
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.errors import LuthierError
from luthier.testing import tiny


def test_a_folder_by_path_word_or_home(tmp_path, monkeypatch):
    path = tiny.checkpoint(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "m", "./m", "~/m"):
        assert resolve(name).n_params == Checkpoint.open(path).n_params


@pytest.mark.parametrize(
    "name, word",
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("modle", "did you mean .*model"),
        ("utterly unlike", "give a folder, a Hub id"),
        ("./no/such/folder", "give a folder"),
    ],
)
def test_unknown_names(tmp_path, monkeypatch, name, word):
    tiny.checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LuthierError, match=word):
        resolve(name)


def test_the_hub_offline_is_one_clear_line(tmp_path, monkeypatch):
    """In a process of its own: the Hub's client reads its settings when it is imported."""
    code = (
        "from luthier.checkpoint.resolve import resolve\n"
        "from luthier.errors import LuthierError\n"
        "try: resolve('somebody/some-model')\nexcept LuthierError as e: print(e)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "'somebody/some-model' is not in the Hub's cache" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_a_model_in_the_hubs_cache_is_found_offline(tmp_path):
    real = tiny.checkpoint(tmp_path / "m")
    home = tmp_path / "hub" / "models--some--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots").mkdir()
    (home / "blobs").mkdir()
    real.rename(home / "snapshots" / "abc")
    code = "from luthier.checkpoint.resolve import resolve; print(resolve('some/model').n_params)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.strip().isdigit(), done.stderr


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(LuthierError, match="is a file, not a model"):
        resolve(tmp_path / "a.txt")
    tiny.checkpoint(tmp_path / "outer" / "inner")
    with pytest.raises(LuthierError, match="did you mean .*inner"):
        resolve(tmp_path / "outer")
    with pytest.raises(LuthierError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


# --- reading


def test_reading_any_stretch_and_none_beyond(tmp_path):
    model = tiny.llama(dtype=torch.bfloat16)
    tiny.save(model, tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = model.state_dict()[name]
    assert torch.equal(checkpoint.read(name), whole)
    for start, count in ((0, 1), (7, 0), (31, 33), (whole.numel() - 1, 1), (whole.numel(), 0)):
        assert torch.equal(checkpoint.read_flat(name, start, count), whole.view(-1)[start : start + count])
    for start, count in ((-1, 2), (0, -1), (whole.numel(), 1), (1, whole.numel())):
        with pytest.raises(ValueError, match="no elements"):
            checkpoint.read_flat(name, start, count)
    with pytest.raises(LuthierError, match="unknown tensor .*did you mean"):
        checkpoint.read(name.replace("up", "ap"))
    checkpoint.read(name).zero_()  # memory of its own: the file and later readings are untouched
    assert torch.equal(checkpoint.read(name), whole)


def test_threads_share_a_checkpoint(tmp_path):
    checkpoint = Checkpoint.open(tiny.checkpoint(tmp_path / "m", shard="8KB"))
    sums = []
    work = lambda: sums.append(sum(float(t.double().sum()) for _, t in checkpoint.items()))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(sums)) == 1 and len(sums) == 8


def test_files_are_closed_with_the_checkpoint(tmp_path):
    path = tiny.checkpoint(tmp_path / "m")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        Checkpoint.open(path).read("model.norm.weight")
    assert len(os.listdir("/dev/fd")) <= before + 1


# --- the hash


def test_the_hash_is_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    hashes = {
        "one": Checkpoint.open(tiny.checkpoint(tmp_path / "one")).hash(),
        "sharded": Checkpoint.open(tiny.checkpoint(tmp_path / "sharded", shard="8KB")).hash(),
        "another": Checkpoint.open(tiny.checkpoint(tmp_path / "another", seed=1)).hash(),
        "narrow": Checkpoint.open(tiny.checkpoint(tmp_path / "narrow", dtype=torch.bfloat16)).hash(),
    }
    assert hashes["one"] == hashes["sharded"] and len(set(hashes.values())) == 3
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    for change, same in (({"transformers_version": "0"}, True), ({"rope_theta": 7.0}, False)):
        (tmp_path / "one" / "config.json").write_text(json.dumps(config | change))
        assert (Checkpoint.open(tmp_path / "one").hash() == hashes["one"]) is same
    (tmp_path / "sharded" / "chat_template.jinja").write_text("other")
    assert Checkpoint.open(tmp_path / "sharded").hash() != hashes["one"]


def test_the_hash_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    checkpoint = Checkpoint.open(tiny.checkpoint(tmp_path / "m"))
    first = checkpoint.hash()
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text("f" * 64)  # a planted answer shows that the note is what is read
    assert checkpoint.hash() == "f" * 64
    file = tmp_path / "m" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    assert Checkpoint.open(tmp_path / "m").hash() not in (first, "f" * 64)


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(LuthierError, match="set LUTHIER_CACHE"):
        cache_folder("x")


def test_the_lock_is_freed_when_its_holder_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from luthier.checkpoint.cache import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    got = threading.Event()

    def wait():
        with locked(tmp_path / "lock"):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.2)
    holder.kill()
    assert got.wait(10)
    thread.join()
    holder.wait()
    holder.stdout.close()
