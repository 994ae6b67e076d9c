"""Writing: whole or not at all, also when killed; stretches in place; live models with all that goes with them."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import is_progress_bar_enabled

from dying import die, ended, fork, kill_after
from luthier.checkpoint import atomic
from luthier.checkpoint.atomic import check_apart
from luthier.checkpoint.card import model_card
from luthier.checkpoint.delta import same_bits
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.writer import ShardWriter, config_with_dtype, copy_sidecars, save_model, write_folder
from luthier.errors import LuthierError
from luthier.testing import tiny


def write_forever(out, n: int) -> None:
    while True:
        n += 1
        with write_folder(out) as temp:
            for name in "abc":
                (temp / name).write_text(str(n) * 20000)


def content(out) -> set[str]:
    return {(out / name).read_text() for name in "abc"}


def test_killed_at_any_moment_the_old_folder_stays_whole(tmp_path):
    out = tmp_path / "out"
    with write_folder(out) as temp:
        for name in "abc":
            (temp / name).write_text("0" * 20000)
    rng = random.Random(0)
    for round_ in range(10):
        pid = fork(lambda n=100 * round_: write_forever(out, n))
        kill_after(pid, rng.uniform(0, 0.05))
        assert ended(pid) == -signal.SIGKILL
        assert len(content(out)) == 1  # three files of one generation
    with write_folder(out) as temp:
        for name in "abc":
            (temp / name).write_text("last")
    assert content(out) == {"last"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # what the killed ones left is gone


def test_a_reader_never_sees_a_mixture_or_a_gap(tmp_path):
    out = tmp_path / "out"
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            fd = os.open(out, os.O_RDONLY)
            try:
                seen.append(tuple(sorted(os.listdir(fd))))
            finally:
                os.close(fd)

    for n in range(40):
        with write_folder(out) as temp:
            (temp / f"file{n}").write_text("x")
        if n == 0:
            thread = threading.Thread(target=look)
            thread.start()
    stop.set()
    thread.join()
    # listing a folder whose last holder is just removing it may show it empty, never mixed
    assert all(len([f for f in names if f.startswith("file")]) <= 1 for names in seen)


def test_an_error_inside_leaves_the_old_folder_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "out"
    with write_folder(out) as temp:
        (temp / "a").write_text("old")
    with pytest.raises(RuntimeError, match="mine"), write_folder(out) as temp:
        (temp / "a").write_text("new")
        raise RuntimeError("mine")
    assert (out / "a").read_text() == "old"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_folders_of_others_are_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(LuthierError, match="not written by Luthier"), write_folder(tmp_path / name):
            raise AssertionError("never here")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    with write_folder(tmp_path / "empty") as temp:
        (temp / "a").write_text("x")
    assert (tmp_path / "empty" / "a").exists()


def test_what_was_put_into_a_folder_of_luthiers_is_never_lost(tmp_path):
    """A note, or a model that stands in it; without it the folder is replaced again."""
    out = tmp_path / "out"
    for content in ("old", "new"):
        with write_folder(out) as temp:
            (temp / "a").write_text(content)
    for make in (lambda p: p.write_text("mine"), lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")):
        make(out / "notes")
        says = "out: holds notes, which Luthier did not put there; move it away"
        with pytest.raises(LuthierError, match=says), write_folder(out) as temp:
            (temp / "a").write_text("newer")
        assert (out / "a").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["out"]
        (out / "notes").rmdir() if (out / "notes").is_dir() else (out / "notes").unlink()
    with write_folder(out) as temp:
        (temp / "a").write_text("newer")
    assert (out / "a").read_text() == "newer"


def test_a_folder_of_an_earlier_version_is_replaced(tmp_path):
    """Its mark does not list what it holds."""
    (out := tmp_path / "out").mkdir()
    (out / "a").write_text("old")
    (out / ".luthier").write_text("This folder was written by Luthier, which may replace it.\n")
    with write_folder(out) as temp:
        (temp / "b").write_text("new")
    assert sorted(os.listdir(out)) == [".luthier", "b"]


def test_what_was_put_into_a_folder_within_is_never_lost(tmp_path):
    """A note beside a tune's change, which stands in a folder of its own."""
    out = tmp_path / "out"

    def write(content):
        with write_folder(out) as temp:
            (temp / "delta").mkdir()
            (temp / "delta" / "a").write_text(content)

    write("old")
    write("new")
    (out / "delta" / "notes").write_text("mine")
    with pytest.raises(LuthierError, match="out: holds delta/notes, which Luthier did not put there"):
        write("newer")
    assert (out / "delta" / "a").read_text() == "new" and (out / "delta" / "notes").read_text() == "mine"


def test_what_is_put_there_during_the_work_is_never_lost(tmp_path):
    out = tmp_path / "out"
    with write_folder(out) as temp:
        (temp / "a").write_text("old")
    with pytest.raises(LuthierError, match="out: holds notes"), write_folder(out) as temp:
        (temp / "a").write_text("new")
        (out / "notes").write_text("mine")
    assert (out / "a").read_text() == "old" and (out / "notes").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("mark", ["", "mine\n", "This folder was written by Luthier", "\xff"])
def test_a_mark_of_others_is_none(tmp_path, mark):
    (out := tmp_path / "out").mkdir()
    (out / ".luthier").write_text(mark, encoding="latin-1")
    with pytest.raises(LuthierError, match="was not written by Luthier"), write_folder(out):
        raise AssertionError
    assert (out / ".luthier").exists()


def test_a_model_in_a_folder_of_an_earlier_version_is_never_lost(tmp_path):
    """Its mark lists nothing, and only a tuned model has a folder within, its change."""
    (out := tmp_path / "out").mkdir()
    (out / ".luthier").write_text("This folder was written by Luthier, which may replace it.\n")
    (out / "delta").mkdir()
    (out / "delta" / "delta.json").write_text("{}")
    tiny.checkpoint(out / "expert")
    with pytest.raises(LuthierError, match="out: holds expert, which Luthier did not put there"), write_folder(out):
        raise AssertionError
    (out / "expert").rename(tmp_path / "expert")
    with write_folder(out) as temp:
        (temp / "b").write_text("new")
    assert sorted(os.listdir(out)) == [".luthier", "b"]


def test_an_input_is_never_replaced_by_what_is_made_of_it(tmp_path):
    """The folder itself, by whatever path, one in it, and a link to it; a folder beside it, or around it, is none."""
    out = tiny.checkpoint(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    for path in (out, out / "delta", tmp_path / "link", out / ".." / "out"):
        with pytest.raises(LuthierError, match="out: holds an input, .*; choose another folder"):
            check_apart(out, [tmp_path / "other", path])
    check_apart(out, [tmp_path, tmp_path / "outer", tmp_path / "other"])
    with pytest.raises(LuthierError, match="holds an input"):
        check_apart(tmp_path / "link", [out])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's table of mounts")
def test_a_folder_of_the_same_disk_may_be_mounted(tmp_path, monkeypatch):
    """A bind mount has its disk's number, so `os.path.ismount` does not know it; spaces are octal in the table."""
    (out := tmp_path / "my out").mkdir()
    line = b"63 43 254:0 /a " + os.fsencode(str(out).replace(" ", "\\040")) + b" rw,relatime - ext4 /dev/vda rw\n"
    real, table = Path.read_bytes, Path("/proc/self/mountinfo")
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + (line if path == table else b""))
    assert not os.path.ismount(out)
    with pytest.raises(LuthierError, match="is a mount point.*name a folder inside it"), write_folder(out):
        raise AssertionError
    with write_folder(out / "inside") as temp:
        (temp / "a").write_text("new")


def test_a_mount_point_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    with pytest.raises(LuthierError, match="is a mount point.*name a folder inside it"), write_folder(out):
        raise AssertionError
    with write_folder(out / "inside") as temp:
        (temp / "a").write_text("new")


def test_a_link_keeps_pointing_where_it_did(tmp_path):
    with write_folder(tmp_path / "real") as temp:
        (temp / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with write_folder(tmp_path / "link") as temp:
        (temp / "a").write_text("2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "2"


def test_a_writer_at_work_is_not_swept_away(tmp_path):
    with write_folder(tmp_path / "out") as one:
        with write_folder(tmp_path / "out") as two:
            (two / "a").write_text("two")
        assert one.exists()
        (one / "a").write_text("one")
    assert (tmp_path / "out" / "a").read_text() == "one"


def test_without_a_call_to_exchange_folders_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    for n in "12":
        with write_folder(tmp_path / "out") as temp:
            (temp / "a").write_text(n)
    assert (tmp_path / "out" / "a").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_between_two_renames_the_old_folder_is_put_back(tmp_path, monkeypatch):
    """Where folders cannot be exchanged a killed process may leave none: the next one finds it again."""
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    out, rename = tmp_path / "out", os.rename
    with write_folder(out) as temp:
        (temp / "a").write_text("old")

    def die_after_the_first(a, b):
        rename(a, b)
        die()

    def write():
        atomic.os.rename = die_after_the_first
        with write_folder(out) as temp:
            (temp / "a").write_text("new")

    assert ended(fork(write)) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(RuntimeError, match="mine"), write_folder(out):
        raise RuntimeError("mine")
    assert (out / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_replaced_in_one_step_and_the_dead_leave_nothing(tmp_path):
    page = atomic.write_file(tmp_path / "page", "old")

    def write():
        atomic.os.replace = lambda a, b: die()
        atomic.write_file(page, "new")

    assert ended(fork(write)) == -signal.SIGKILL
    assert page.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    atomic.write_file(page, "newer")
    assert page.read_text() == "newer" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(LuthierError, match="cannot be written"):
        atomic.write_file(tmp_path / "file" / "page", "x")


def test_a_folder_is_removed_whole(tmp_path):
    """Killed on the way it is gone from its place, and swept up later."""
    (tmp_path / "steps" / "a").mkdir(parents=True)

    def remove():
        atomic.shutil.rmtree = lambda *_, **__: die()
        atomic.discard(tmp_path / "steps")

    assert ended(fork(remove)) == -signal.SIGKILL
    assert not (tmp_path / "steps").exists() and len(list(tmp_path.iterdir())) == 1
    atomic.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path):
    out = tmp_path / "out"
    with write_folder(out) as temp:
        (temp / "a").write_text("old")
    limited = """
import resource, signal, sys, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from collections import namedtuple
from luthier.checkpoint.writer import ShardWriter, write_folder
from luthier.errors import LuthierError
Info = namedtuple("Info", "name dtype shape")
try:
    with write_folder(sys.argv[1]) as temp, ShardWriter(temp, [Info("w", torch.float32, (1000,))]):
        pass
except LuthierError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", limited, str(out)], capture_output=True, text=True)
    assert "nothing was changed" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert (out / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]
    line = str(atomic.disk_fault(OSError(errno.ENOSPC, "No space left on device"), out))
    assert "the disk is full" in line and "free some space" in line


# --- stretches in place


def rewrite(source: Checkpoint, out, limit: int, seed: int) -> Checkpoint:
    """Copy a checkpoint through ShardWriter, in stretches of 97 elements in random order, from four threads."""
    jobs = [(n, s) for n, info in source.tensors.items() for s in range(0, info.numel, 97)]
    random.Random(seed).shuffle(jobs)
    with write_folder(out) as temp:
        copy_sidecars(source, temp)
        with ShardWriter(temp, source.tensors.values(), {"made": "here"}, max_shard_bytes=limit) as writer:

            def work(part):
                for name, start in part:
                    count = min(97, source.tensors[name].numel - start)
                    writer.write(name, start, source.read_flat(name, start, count))

            threads = [threading.Thread(target=work, args=(jobs[i::4],)) for i in range(4)]
            [t.start() for t in threads]
            [t.join() for t in threads]
    return Checkpoint.open(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stretches_in_any_order_give_the_same_bytes_in_any_sharding(tmp_path, dtype):
    source = Checkpoint.open(tiny.checkpoint(tmp_path / "m", dtype=dtype))
    one, many = (rewrite(source, tmp_path / f"out{limit}", limit, limit) for limit in (10**9, 9000))
    assert len({i.file for i in one.tensors.values()}) == 1 < len({i.file for i in many.tensors.values()})
    assert list(one.tensors) == list(many.tensors) == list(source.tensors)
    for name, tensor in source.items():
        assert same_bits(one.read(name), tensor) and same_bits(many.read(name), tensor)
    assert one.hash() == many.hash() == source.hash()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out9000")
    assert all(same_bits(t, source.read(n)) for n, t in stock.state_dict().items())
    sizes = [f.stat().st_size for f in (tmp_path / "out9000").glob("*.safetensors")]
    assert sum(i.nbytes for i in source.tensors.values()) < sum(sizes)


def test_shards_keep_their_limit_unless_one_tensor_is_larger(tmp_path):
    source = Checkpoint.open(tiny.checkpoint(tmp_path / "m"))
    many = rewrite(source, tmp_path / "out", 9000, 0)
    for file in {i.file for i in many.tensors.values()}:
        held = [i.nbytes for i in many.tensors.values() if i.file == file]
        assert len(held) == 1 or sum(held) <= 9000


def test_the_whole_file_is_claimed_before_a_stretch_is_written(tmp_path):
    source = Checkpoint.open(tiny.checkpoint(tmp_path / "m"))
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", source.tensors.values()):
        stat = (tmp_path / "out" / "model.safetensors").stat()
        assert stat.st_blocks * 512 >= source.nbytes and stat.st_size > source.nbytes


def test_values_are_cast_to_the_declared_dtype_and_must_fit(tmp_path):
    Info = type(next(iter(Checkpoint.open(tiny.checkpoint(tmp_path / "m")).tensors.values())))
    info = Info("w", torch.bfloat16, (2, 3), tmp_path, 0, 12)
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", [info]) as writer:
        writer.write("w", 2, torch.tensor([1.003, -2.0, 3.0, 4.0]))
        for start, count in ((3, 4), (-1, 2), (7, 0)):
            with pytest.raises(ValueError, match="do not fit"):
                writer.write("w", start, torch.zeros(count))
    got = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert got.dtype == torch.bfloat16 and got.view(-1).tolist() == [0, 0, 1.0, -2.0, 3.0, 4.0]


def test_sidecars_go_along_and_remote_code_does_not(tmp_path):
    path = tiny.checkpoint(tmp_path / "m")
    (path / "LICENSE").write_text("free")
    (path / "LICENSES").mkdir()
    (path / "modeling_evil.py").write_text("")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_evil.M"}}))
    source = Checkpoint.open(path)
    (tmp_path / "out").mkdir()
    copy_sidecars(source, tmp_path / "out", config_with_dtype(source.config, torch.bfloat16))
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= made
    assert "modeling_evil.py" not in made
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in new and new["dtype"] == "bfloat16" and new["hidden_size"] == config["hidden_size"]


# --- live models


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_a_saved_model_is_a_plain_hugging_face_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    model = tiny.llama(dtype=torch.bfloat16, tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 7
    card = model_card("luthier: 1\n", ["merge.ties"], "tiny/base", ["a note"])
    out = save_model(tmp_path / "out", model, tiny.tokenizer(), card)
    assert capfd.readouterr() == ("", "") and is_progress_bar_enabled()  # silent, and the user's setting is back
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored and all(t.dtype == torch.bfloat16 for t in stored.values())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(again, LlamaForCausalLM) and again.generation_config.max_new_tokens == 7
    assert all(same_bits(a, again.state_dict()[n]) for n, a in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns) == tiny.tokenizer().apply_chat_template(turns)
    assert "merge.ties" in (out / "README.md").read_text()


def test_what_would_not_reload_is_refused(tmp_path):
    model = tiny.llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(LuthierError, match="model.layers.0.mlp.up_proj: a live parametrization"):
        save_model(tmp_path / "out", model)
    model = tiny.llama()
    model.hf_quantizer = object()
    with pytest.raises(LuthierError, match="quantized"):
        save_model(tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_the_card_carries_the_recipe_whole_and_a_header_the_hub_reads():
    from huggingface_hub import ModelCard

    recipe = "luthier: 1\nnotes: |\n  ```\n  fenced: ````\n"
    card = model_card(
        recipe, ["tune.lift", "merge.ties"], "a/b", ['dequantised: "Q4_1"\nsecond line'], license="apache-2.0"
    )
    read = ModelCard(card).data.to_dict()
    assert read["base_model"] == "a/b" and read["license"] == "apache-2.0" and read["library_name"] == "transformers"
    assert read["tags"] == ["luthier", "tune.lift", "merge.ties", "merge"]
    assert f"`````yaml\n{recipe}`````" in card
    assert '- dequantised: "Q4_1" second line\n' in card
    assert "base_model" not in model_card("", [], None)


def test_the_card_says_how_to_load_the_model(tmp_path):
    from luthier.model import build_model

    small = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours = build_model({**small, "slots": {"norm": "norm.lns"}}, 0)
    said = {}
    for kind, model in (("stock", tiny.llama()), ("ours", ours)):
        out = save_model(tmp_path / kind, model, tiny.tokenizer(), model_card("", [], None))
        said[kind] = (out / "README.md").read_text()
    assert "plain transformers" in said["stock"] and "import luthier" not in said["stock"]
    assert "plain transformers" not in said["ours"]
    lines = said["ours"].split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "ours"))
    code = f"{lines}\nprint(sum(p.numel() for p in model.parameters()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(p.numel() for p in ours.parameters())


def test_killed_while_saving_models_the_folder_is_one_of_them(tmp_path):
    """A child saves two models in turn, in shards and live; killed at random moments it leaves one of the two."""
    models = [tiny.llama(seed) for seed in (0, 1)]
    for seed in (0, 1):
        save_model(tmp_path / f"m{seed}", models[seed], tiny.tokenizer(), "card")
    known = {Checkpoint.open(tmp_path / f"m{seed}").hash() for seed in (0, 1)}
    out, rng = tmp_path / "out" / "m", random.Random(1)
    save_model(out, models[0], tiny.tokenizer(), "card")

    def save_forever():
        while True:
            rewrite(Checkpoint.open(tmp_path / "m1"), out, 9000, 0)
            save_model(out, models[0], tiny.tokenizer(), "card")

    for _ in range(10):
        pid = fork(save_forever)
        kill_after(pid, rng.uniform(0.02, 0.3))
        assert ended(pid) == -signal.SIGKILL
        assert Checkpoint.open(out).hash() in known
    save_model(out, models[0])
    assert [p.name for p in out.parent.iterdir()] == ["m"]
