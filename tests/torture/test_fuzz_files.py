"""Files of every format we read, with bytes and values changed: read or refused in one line, nothing else."""

import json
import random
import struct
import time
from itertools import cycle

import hostile_adapters
import hostile_gguf
import pytest
import torch
from hostile import CONFIG, EMBED, NORM, entry, safetensors

from luthier.certificate import Certificate
from luthier.checkpoint.delta import Delta
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.gguf import from_gguf
from luthier.checkpoint.gguf_file import GgufFile
from luthier.checkpoint.reader import Checkpoint
from luthier.engine.data import open_data
from luthier.errors import LuthierError
from luthier.flows import Table
from luthier.kit.context import Context
from luthier.ledger import Ledger, Record

VALUES = [None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0, "", "x", "../x", "/etc/passwd", "a\0b",
    "\ud800",
          [], {}, [0, 1], [[]], {"a": 1}, "F32", "I64", "9" * 5000]  # fmt: skip


def spoilt(rng, raw):
    """The bytes after a few changes."""
    made = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made)) if made else 0
        way = rng.randrange(5)
        if way == 0 and made:
            made[at] = rng.randrange(256)
        elif way == 1:
            made[at : at + rng.randint(1, 8)] = b""
        elif way == 2:
            made[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        elif way == 3:
            made[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
        else:
            other = rng.randrange(len(made)) if made else 0
            made[at : at + 12] = made[other : other + 12]
    return bytes(made)


def other(rng, value, depth=0):
    """JSON values with one of them another."""
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value or depth > 6:
        return rng.choice(VALUES)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return rng.choice(
            [[*value[:i], other(rng, value[i], depth + 1), *value[i + 1 :]], [*value, value[i]], value[:i]]
        )
    key = rng.choice(list(value))
    if rng.random() < 0.3:
        return {k: v for k, v in value.items() if k != key} | (
            {} if rng.random() < 0.5 else {str(rng.choice(VALUES)): 1}
        )
    return value | {key: other(rng, value[key], depth + 1)}


def ends(work):
    """Whether it was read; refused means one short line, in bounded time."""
    started = time.process_time()
    try:
        work()
    except LuthierError as fault:
        assert str(fault) and len(str(fault)) < 1300
        return False
    finally:
        assert time.process_time() - started < 10
    return True


def survive(count, tell, what, spoil, read):
    """Spoil and read so many times; some of it has to be readable still."""
    still = 0
    for _ in range(count):
        spoil()
        still += ends(read)
    assert still
    tell(f"spoilt {what}: {count}, {still} still readable")


def spoil_pair(rng, about, value, tensors, raw):
    """A JSON file with another value more often than not, beside tensors spoilt half the time."""
    about.write_text(json.dumps(other(rng, value) if rng.random() < 0.6 else value))
    tensors.write_bytes(spoilt(rng, raw) if rng.random() < 0.5 else raw)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good base, and a file to spoil."""
    here = tmp_path_factory.mktemp("files")
    hostile_adapters.on_base(here)
    return here


def read_all(folder):
    made = Checkpoint.open(folder)
    for name, tensor in made.items():
        assert tensor.shape == made.tensors[name].shape


def whole(header, data):
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_safetensors(place, times, tell):
    rng = random.Random(1)
    folder = place / "st"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = {EMBED: entry([3, 2], [0, 24]), NORM: entry([2], [24, 28], "BF16"), "__metadata__": {"format": "pt"}}
    made = cycle([lambda: whole(other(rng, header), bytes(28)), lambda: spoilt(rng, whole(header, bytes(28)))])

    def spoil():
        (folder / "model.safetensors").write_bytes(next(made)())

    survive(times(400, 15_000), tell, "safetensors", spoil, lambda: read_all(folder))


def test_configs_and_indices(place, times, tell):
    rng = random.Random(2)
    folder = place / "index"
    folder.mkdir()
    for file, name, size in (("a", EMBED, 24), ("b", NORM, 8)):
        safetensors(folder / f"{file}.safetensors", {name: entry([size // 8, 2] if size > 8 else [2], [0, size])}, size)
    index = {"weight_map": {EMBED: "a.safetensors", NORM: "b.safetensors"}, "metadata": {"total_size": 32}}

    def spoil():
        for name, value in (("config.json", CONFIG), ("model.safetensors.index.json", index)):
            (folder / name).write_text(json.dumps(other(rng, value) if rng.random() < 0.5 else value))

    survive(times(200, 6000), tell, "configs and indices", spoil, lambda: read_all(folder))


def test_ggufs(place, times, tell):
    rng = random.Random(3)
    words = ["a", "b", "c"]
    raw = hostile_gguf.tokens(
        hostile_gguf.words("tokenizer.ggml.tokens", words), hostile_gguf.words("tokenizer.ggml.merges", ["a b"]),
        hostile_gguf.u32("tokenizer.ggml.eos_token_id", 1),
    )  # fmt: skip
    path = place / "m.gguf"

    def convert():
        GgufFile(path)
        if rng.random() < 0.3:
            from_gguf(path, place / "converted")

    path.write_bytes(raw)
    GgufFile(path).read("token_embd.weight")
    survive(times(400, 20_000), tell, "GGUFs", lambda: path.write_bytes(spoilt(rng, raw)), convert)


def test_adapters(place, times, tell):
    rng = random.Random(4)
    folder, base = place / "lora", Checkpoint.open(place / "good")
    folder.mkdir()
    config = hostile_adapters.PEFT | {
        "rank_pattern": {"q": 2},
        "alpha_pattern": {"embed_tokens": 3},
        "use_rslora": False,
    }

    files = folder / "adapter_config.json", config, folder / "adapter_model.safetensors"
    raw = whole(hostile_adapters.PAIR, bytes(20))

    def put_on():
        open_expert(folder, base).read(EMBED)

    survive(times(200, 6000), tell, "adapters", lambda: spoil_pair(rng, *files, raw), put_on)


def test_deltas(place, times, tell):
    rng = random.Random(5)
    folder, base = place / "delta", Checkpoint.open(place / "good")
    folder.mkdir()
    about = {"luthier_delta": 1, "kind": "sparse", "base": "", "notes": {"a": 1}, "shapes": {EMBED: [3, 2]}}

    def put_on():
        delta = Delta.open(folder)
        open_expert(folder, base).read(EMBED)
        target = {EMBED: base.read(EMBED)}
        before = target[EMBED].clone()
        delta.apply_(target)
        delta.revert_(target)
        assert torch.equal(target[EMBED].view(torch.int32), before.view(torch.int32))

    files, raw = (folder / "delta.json", about, folder / "delta.safetensors"), whole(*hostile_adapters.sparse())
    survive(times(200, 6000), tell, "deltas", lambda: spoil_pair(rng, *files, raw), put_on)


def test_lines_of_data(place, times, tell):
    rng = random.Random(6)
    path = place / "d.jsonl"
    lines = [{"text": "one two"}, {"prompt": "a", "answer": "b"},
             {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3  # fmt: skip

    def opened():
        data = open_data("d", {"source": f"jsonl:{path}", "split": {"test": 2}}, Context())
        assert data.overlap() == 0 and len(data.test) <= 2

    def spoil():
        made = [other(rng, line) if rng.random() < 0.2 else line for line in lines]
        raw = "\n".join(json.dumps(line) for line in made).encode()
        path.write_bytes(spoilt(rng, raw) if rng.random() < 0.5 else raw)

    survive(times(200, 6000), tell, "lines of data", spoil, opened)


def test_records_tables_and_certificates(place, times, tell):
    rng, count, read = random.Random(7), times(300, 10_000), 0
    record = Record("r", "a", "a", "0" * 16, "done", "merge.ties", "Transform", 0, artefacts={"model": "steps/a"},
                    metrics={"loss": 1.0}, notes=("n",)).as_dict()  # fmt: skip
    table = {"columns": ["a", "b"], "rows": [[1, "x"], [2, None]], "notes": ["n"]}
    proof = {"status": "exact", "reason": "", "variables": ["x"], "polynomial": [[[2], "1"]], "basis": [[1]],
        "point": [],
             "squares": [["1", [[[1], "1"]]]], "functional": [[[0], "1"]], "numbers": {"a": 1}}  # fmt: skip
    ledger = Ledger(place / "run")

    def recorded(text):
        made = ledger._record(text)
        assert all(not path.startswith("/") and ".." not in path for path in made.artefacts.values())

    def proven(text):
        made = Certificate.from_json(text)
        assert made.refusal() is None or made.refusal()

    for _ in range(count):
        for value, read_ in ((record, recorded), (table, Table.from_json), (proof, proven)):
            text = json.dumps(other(rng, value))
            read += ends(lambda text=text, read_=read_: read_(text))
    assert read
    tell(f"spoilt records, tables and certificates: {3 * count}, {read} still readable")
