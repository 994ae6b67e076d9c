"""Damaged and hostile files, made here by a script: each is refused in one line that names file and tensor."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.checkpoint.delta import Delta
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.header import read_header, read_json
from luthier.checkpoint.reader import Checkpoint, check_finite
from luthier.checkpoint.resolve import resolve
from luthier.checkpoint.writer import copy_sidecars, write_folder
from luthier.errors import LuthierError
from luthier.testing import tiny

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2, "vocab_size": 3,
    "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip
EMBED = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


def entry(shape: list, span: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def good() -> dict:
    return {EMBED: entry([3, 2], [0, 24]), NORM: entry([2], [24, 32])}


def write(path: Path, header: dict | bytes, size: int = 32, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size))


def folder(path: Path, header: dict | bytes | None = None, **file: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if header is not None:
        write(path / "model.safetensors", header, **file)
    return path


def refused(path: Path, *words: str) -> str:
    """The one line with which opening fails; it must hold these words."""
    with pytest.raises(LuthierError) as caught:
        Checkpoint.open(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    for word in words:
        assert word in line, line
    return line


def test_the_good_file_of_this_script_opens(tmp_path):
    assert list(Checkpoint.open(folder(tmp_path, good())).tensors) == [EMBED, NORM]


BAD_HEADERS = {
    "shape and bytes disagree": ({EMBED: entry([4, 2], [0, 24]), NORM: entry([2], [24, 32])}, [EMBED, "needs 32"]),
    "overlap": ({EMBED: entry([3, 2], [0, 24]), NORM: entry([2], [20, 28])}, [NORM, "overlaps"]),
    "hole": ({EMBED: entry([3, 2], [0, 24]), NORM: entry([1], [28, 32])}, [NORM, "hole of 4"]),
    "bytes left over": ({EMBED: entry([3, 2], [0, 24])}, ["8 bytes follow"]),
    "beyond the end": ({EMBED: entry([3, 2], [0, 24]), NORM: entry([9], [24, 60])}, [NORM, "truncated"]),
    "negative": ({EMBED: entry([-3, -2], [0, 24]), NORM: entry([2], [24, 32])}, [EMBED, "no sense"]),
    "backwards": ({EMBED: entry([3, 2], [24, 0]), NORM: entry([2], [24, 32])}, [EMBED, "no sense"]),
    "huge": ({EMBED: entry([2**60, 2**60], [0, 24]), NORM: entry([2], [24, 32])}, [EMBED, "needs"]),
    "a boolean as a size": ({EMBED: entry([True, 6], [0, 24]), NORM: entry([2], [24, 32])}, [EMBED, "no sense"]),
    "a float as a size": ({EMBED: entry([3.0, 2], [0, 24]), NORM: entry([2], [24, 32])}, [EMBED, "no sense"]),
    "unknown dtype": ({EMBED: entry([3, 2], [0, 24], "F31"), NORM: entry([2], [24, 32])}, [EMBED, "F31"]),
    "dtype of another kind": ({EMBED: entry([3, 2], [0, 24], ["F32"]), NORM: entry([2], [24, 32])}, [EMBED]),  # type: ignore[arg-type]
    "no offsets": ({EMBED: {"dtype": "F32", "shape": [3, 2]}}, [EMBED, "data_offsets"]),
    "an entry that is a word": ({EMBED: "F32"}, [EMBED]),
    "metadata that is a list": (good() | {"__metadata__": ["pt"]}, ["metadata"]),
    "a list": (b"[1, 2, 3]", ["begin with"]),
    "no JSON": (b"{nonsense}", ["JSON"]),
    "not UTF-8": (b'{"\xff": 1}', ["JSON"]),
    "NaN in the header": (b'{"a": NaN}', ["JSON"]),
    "a thousand lists deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["JSON"]),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", ["JSON"]),
    "a name twice": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', ["'a'", "twice"]),
    "empty": (b"{}", ["bytes follow"]),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path, case):
    header, words = BAD_HEADERS[case]
    refused(folder(tmp_path, header), "model.safetensors", *words)


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10_000])
def test_absurd_header_lengths(tmp_path, length):
    refused(folder(tmp_path, good(), length=length), "model.safetensors", "header of")


def test_no_tensor_at_all(tmp_path):
    refused(folder(tmp_path, b"{}", size=0), "not one tensor")


@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_a_real_file_cut_short(tmp_path, size):
    path = tiny.checkpoint(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:size])
    refused(path, "model.safetensors", "truncated")
    (path / "model.safetensors").write_bytes(whole[:-1])
    refused(path, "model.safetensors", "tensor", "truncated")


def test_a_file_cut_after_it_was_opened(tmp_path):
    checkpoint = Checkpoint.open(folder(tmp_path, good()))
    os.truncate(tmp_path / "model.safetensors", os.path.getsize(tmp_path / "model.safetensors") - 4)
    checkpoint.read(EMBED)
    with pytest.raises(LuthierError, match="too early"):
        checkpoint.read(NORM)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_ends_in_another_error(tmp_path_factory, data):
    path = folder(tmp_path_factory.getbasetemp() / "fuzz", good())
    raw = bytearray((path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        checkpoint = Checkpoint.open(path)
        assert all(t.shape == checkpoint.tensors[n].shape for n, t in checkpoint.items())
    except LuthierError as error:
        assert "\n" not in str(error)


def sharded(path: Path) -> tuple[Path, dict]:
    tiny.checkpoint(path, shard="8KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    return path, index


def test_a_missing_shard(tmp_path):
    path, index = sharded(tmp_path / "m")
    gone = sorted(set(index["weight_map"].values()))[1]
    (path / gone).unlink()
    refused(path, gone, "missing")


def test_a_shard_of_another_model(tmp_path):
    path, index = sharded(tmp_path / "m")
    one, two = sorted(set(index["weight_map"].values()))[:2]
    (path / two).write_bytes((path / one).read_bytes())
    refused(path, two, "is also in")


def test_a_tensor_the_index_puts_elsewhere(tmp_path):
    path, index = sharded(tmp_path / "m")
    name, file = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "index.json", name, "does not hold it")


def test_a_tensor_the_index_forgets(tmp_path):
    path, index = sharded(tmp_path / "m")
    name = next(n for n, f in index["weight_map"].items() if list(index["weight_map"].values()).count(f) > 1)
    del index["weight_map"][name]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, name, "not in the index")


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_that_points_outside_its_folder(tmp_path, target):
    path, index = sharded(tmp_path / "m")
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = target
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "index.json", name, "outside")


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{", '{"weight_map": {}}']
)
def test_an_index_that_is_none(tmp_path, text):
    path, _ = sharded(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, "index.json")


def test_a_link_out_of_the_folder(tmp_path):
    real = tiny.checkpoint(tmp_path / "real")
    path = folder(tmp_path / "m")
    (path / "model.safetensors").symlink_to(real / "model.safetensors")
    refused(path, "link out of its folder")


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_an_index_that_is_no_file_of_the_folder(tmp_path, kind):
    """A pipe would block and a device never end; this process may take no more memory than it has and a little."""
    path, _ = sharded(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "device":
        index.symlink_to("/dev/zero")
    else:
        (tmp_path / "elsewhere.json").write_text(text)
        index.symlink_to(tmp_path / "elsewhere.json")
    code = "import sys; from luthier.checkpoint.reader import Checkpoint; Checkpoint.open(sys.argv[1])"
    limited = f"ulimit -v 8000000; exec {sys.executable} -c '{code}' {path}"
    made = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert ("link out of its folder" if kind == "link" else "the file is missing") in made.stderr


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_json_that_is_no_file(tmp_path, kind):
    path = tmp_path / "a.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(LuthierError, match="a.json: is no file"):
        read_json(path)


@pytest.mark.parametrize("name", ["delta.json", "adapter_config.json"])
def test_a_change_whose_description_links_out_of_the_folder(tmp_path, name):
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder := tmp_path / "change").mkdir()
    (folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(LuthierError, match=f"{name}: is a link out of its folder"):
        Delta.open(folder)


def test_a_tokenizer_that_links_out_of_the_folder_is_not_copied(tmp_path):
    (tmp_path / "secret").write_text("key")
    path = tiny.checkpoint(tmp_path / "m")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(LuthierError, match="link out of its folder"), write_folder(tmp_path / "out") as temp:
        copy_sidecars(Checkpoint.open(path), temp)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "secret"]
    (path / "config.json").unlink()
    (path / "config.json").symlink_to(tmp_path / "secret")
    refused(path, "config.json", "link out of its folder")


def test_quantized_weights_are_no_numbers_to_merge(tmp_path):
    path = folder(tmp_path / "m", good())
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(LuthierError, match="the weights are quantized"):
        copy_sidecars(Checkpoint.open(path), tmp_path)


def test_a_folder_that_holds_only_a_change(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "name the base")


def test_the_links_of_the_hubs_own_cache_are_fine(tmp_path):
    real = tiny.checkpoint(tmp_path / "real")
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    for file in real.iterdir():
        file.rename(home / "blobs" / f"blob-{file.name}")
        (home / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert Checkpoint.open(home / "snapshots" / "abc").n_params > 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it ran"),))

    path = folder(tmp_path / "m")
    torch.save({"a": Bomb()}, path / name)
    refused(path, name, "pickle", "can run any program")
    with pytest.raises(LuthierError, match="pickle"):
        resolve(path / name)
    assert not (tmp_path / "it ran").exists()


def test_a_pickled_adapter_is_refused(tmp_path):
    base = Checkpoint.open(tiny.checkpoint(tmp_path / "base"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    torch.save({}, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(LuthierError, match="pickle"):
        open_expert(tmp_path / "lora", base)


def test_remote_code_is_ignored_with_a_notice(tmp_path):
    path = folder(tmp_path, good())
    (path / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "evil.Model"}}))
    (path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'it ran')!r})")
    (notice,) = Checkpoint.open(path).notices
    assert "auto_map" in notice and not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"model_type": 3}', '{"model_type": "llama", "model_type": "x"}']
)
def test_bad_config(tmp_path, text):
    path = folder(tmp_path, good())
    (path / "config.json").write_text(text)
    refused(path, "config.json")


def test_config_and_tensors_of_two_models(tmp_path):
    path = folder(tmp_path, good())
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 5}))
    refused(path, EMBED, "[3, 2]", "[5, 2]")
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    refused(path, "layer 1 of 2 has no tensors")


def test_several_files_and_no_index(tmp_path):
    path = folder(tmp_path)
    for name in ("a", "b"):
        write(path / f"{name}.safetensors", good())
    refused(path, "2 safetensors files", "index")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_tensor_that_is_not_finite(bad, dtype):
    tensor = torch.ones(3, 4).to(dtype)
    check_finite("w", tensor, "file")
    tensor[1, 2] = bad
    for where in ("file", "file: tensor 'w'"):
        with pytest.raises(LuthierError, match=r"^file: tensor 'w': 1 of 12 values are NaN or infinite$"):
            check_finite("w", tensor, where)


def test_whole_numbers_are_always_finite():
    check_finite("w", torch.tensor([2**31 - 1]), "file")


def test_headers_are_read_as_the_format_writes_them(tmp_path):
    """Against the reference implementation: every dtype, an empty tensor, a scalar, metadata."""
    from safetensors.torch import save_file

    from luthier.checkpoint.header import DTYPES

    tensors = {f"t{i}": torch.zeros(i, 2).to(dtype) for i, dtype in enumerate(DTYPES.values()) if dtype.itemsize < 8}
    tensors |= {"scalar": torch.tensor(3.5), "long": torch.arange(5), "double": torch.ones(2).double()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    entries, metadata, _ = read_header(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    assert {e.name: (e.dtype, e.shape) for e in entries} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
