"""Safetensors files and their index."""

import json
import os
import struct
from pathlib import Path

from hostile import CONFIG, EMBED, MERGE, NORM, case, entry, folder, good, merge, merged, safetensors

FILE = "model.safetensors"
TWO = {NORM: entry([2], [24, 32])}


def both(first, second=None):
    return {EMBED: first, NORM: second or entry([2], [24, 32])}


case("header: length 0", merged(b"", length=0, data=0), FILE, "does not begin")
case("header: absurd length", merged(length=2**63 + 5), FILE, "absurd header")
case("header: length beyond the file", merged(length=5000), FILE, "truncated: a header of 5,000")
case("header: file of five bytes", merged(b"", length=0, data=b""), FILE, "does not begin")
case("header: no JSON", merged(b"{nonsense}"), FILE, "not valid JSON")
case("header: a list", merged(b"[1, 2]"), FILE, "does not begin")
case("header: not UTF-8", merged(b'{"\xff\xfe": 1}'), FILE, "not valid JSON")
case("header: NaN", merged(b'{"a": NaN}'), FILE, "not valid JSON")
case("header: 100,000 lists deep", merged(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), FILE, "not valid JSON")
case("header: a number of 5000 digits", merged(b'{"a": ' + b"9" * 5000 + b"}"), FILE, "not valid JSON")
case("header: a name twice", merged(b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}'), "'a' occurs twice")
case("header: half a million names, the last one twice",
     merged(b"{" + b",".join(b'"%d":1' % min(i, 499_998) for i in range(500_000)) + b"}"), "'499998' occurs twice",
     cpu=15)  # fmt: skip
case("header: millions of empty lists", merged(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), FILE, "too many lists")
case("header: tensor that is a word", merged({EMBED: "F32"}), EMBED, "should hold dtype, shape")
case("header: tensor without offsets", merged({EMBED: {"dtype": "F32", "shape": [3, 2]}}), EMBED, "data_offsets")
case("header: metadata a list", merged(good() | {"__metadata__": ["pt"]}), "metadata")
case("header: metadata of numbers", merged(good() | {"__metadata__": {"a": 1}}), "metadata")
case("header: no tensor", merged(b"{}", data=0), "not one tensor")

case("offsets: negative", merged(both(entry([3, 2], [-24, 0]))), EMBED, "makes no sense")
case("offsets: overlapping", merged({EMBED: entry([3, 2], [0, 24]), NORM: entry([2], [20, 28])}), NORM, "overlaps")
case("offsets: the same bytes twice", merged({EMBED: entry([4], [0, 16]), NORM: entry([4], [0, 16])}, data=16),
     "overlaps")  # fmt: skip
case("offsets: a hole", merged({EMBED: entry([3, 2], [0, 24]), NORM: entry([1], [28, 32])}), NORM, "hole of 4")
case("offsets: reversed", merged(both(entry([3, 2], [24, 0]))), EMBED, "makes no sense")
case("offsets: floats", merged(both(entry([3, 2], [0.0, 24.0]))), EMBED, "makes no sense")
case("offsets: huge", merged(both(entry([3, 2], [2**63, 2**63 + 24]))), EMBED, "makes no sense")
case("offsets: three", merged(both(entry([3, 2], [0, 12, 24]))), EMBED, "makes no sense")
case("offsets: words", merged(both(entry([3, 2], ["0", "24"]))), EMBED, "makes no sense")
case("offsets: beyond the end", merged(both(entry([3, 2], [0, 24]), entry([9], [24, 60]))), NORM, "truncated")

case("shape: overflows 64 bits", merged(both(entry([2**60, 2**60], [0, 24]))), EMBED, "needs")
case("shape: wraps round to the right size", merged(both(entry([2**61, 2**61, 3], [0, 24]))), EMBED, "needs")
case("shape: zero by enormous", merged({EMBED: entry([3, 2], [0, 24]), "a": entry([0, 2**61, 2**61], [24, 24]),
     NORM: entry([2], [24, 32])}), "'a'", "makes no sense")  # fmt: skip
case("shape: negative", merged(both(entry([-3, -2], [0, 24]))), EMBED, "makes no sense")
case("shape: boolean", merged(both(entry([True, 6], [0, 24]))), EMBED, "makes no sense")
case("shape: float", merged(both(entry([3.0, 2], [0, 24]))), EMBED, "makes no sense")
case("shape: null", merged(both(entry(None, [0, 24]))), EMBED, "makes no sense")
case("shape: a million axes of one", merged(both(entry([1] * 1_000_000 + [3, 2], [0, 24]))), EMBED, "axes")
case("shape: zero size", merged({EMBED: entry([3, 2], [0, 24]), "a": entry([0, 5], [24, 24]),
     NORM: entry([2], [24, 32])}), "'a'", "in this model only")  # fmt: skip

case("dtype: unknown", merged(both(entry([3, 2], [0, 24], "F31"))), EMBED, "unknown dtype 'F31'")
case("dtype: a list", merged(both(entry([3, 2], [0, 24], ["F32"]))), EMBED, "unknown dtype")
case("dtype: of other bytes", merged(both(entry([3, 2], [0, 24], "F64"))), EMBED, "needs 48")
case("dtype: a megabyte long", merged(both(entry([3, 2], [0, 24], "F" * 1_000_000))), EMBED, "unknown dtype")
case("dtype: whole numbers for weights", merged(both(entry([3, 2], [0, 24], "I32"))), EMBED, "I32", "F32")

NAN, INF = struct.pack("<6f", *[float("nan")] * 6) + bytes(8), struct.pack("<6f", *[float("-inf")] * 6) + bytes(8)
case("values: NaN", merged(good(), data=NAN), EMBED, "6 of 6 values are NaN")
case("values: infinity", merged(good(), data=INF), EMBED, "6 of 6 values are NaN or infinite")
case("values: truncated", merged(good(), data=31), NORM, "truncated")
case("values: trailing bytes", merged(good(), data=40), "8 bytes follow")

NAMES = {
    "path": "../../../etc/passwd", "absolute path": "/etc/passwd", "NUL": "a\0b", "escapes": "\x1b[31mred\x07",
    "lone surrogate": "\ud800", "a megabyte": "w" * 1_000_000, "two megabytes of dots": "a." * 1_000_000 + "weight",
    "a layer of 5000 digits": "model.layers." + "9" * 5000 + ".x.weight", "line ends": "a\nluthier: done\n",
}  # fmt: skip
for what, name in NAMES.items():
    case(f"name: {what}", merged({EMBED: entry([3, 2], [0, 24]), name: entry([2], [24, 32])}), "tensor")
case("name: empty", merged({EMBED: entry([3, 2], [0, 24]), "": entry([2], [24, 32])}), "tensor")


def accepted(here: Path):
    """Odd names in both models: they are only names."""
    header = good() | {n: entry([0], [32, 32]) for n in ("../../x", "/etc/passwd", "a\0b", "")}
    for name in ("good", "bad"):
        folder(here, name, header)
    return merge(here)


case("name: path tricks in both are only names", accepted)


def index(listed, files=("a", "b"), link=None, text=None):
    """Two shards, an index that says `listed`."""

    def make(here: Path):
        folder(here, "good")
        bad = folder(here, "bad", False)
        for file, name, shape in zip(files, (EMBED, NORM), ([3, 2], [2]), strict=False):
            size = 4 * (6 if name == EMBED else 2)
            safetensors(bad / f"{file}.safetensors", {name: entry(shape, [0, size])}, data=size)
        if link:
            (bad / "b.safetensors").unlink(missing_ok=True)
            os.symlink(link, bad / "b.safetensors")
        raw = text if text is not None else json.dumps({"weight_map": listed})
        (bad / "model.safetensors.index.json").write_text(raw)
        return merge(here)

    return make


OK = {EMBED: "a.safetensors", NORM: "b.safetensors"}
case("index: whole and good", index(OK))
for what, target in {
    "relative path": "../good/model.safetensors", "absolute path": "/etc/passwd", "empty": "", "dots": "..",
    "backslash": "..\\x", "NUL": "b.safetensors\0", "inner folder": "x/b.safetensors",
}.items():  # fmt: skip
    case(f"index: {what}", index(OK | {NORM: target}), "index.json", NORM, "points outside the folder")
case("index: a word where the map belongs", index("a.safetensors"), "index.json", "no weight_map")
case("index: numbers for files", index({EMBED: 1}), "index.json", "no weight_map")
case("index: a list", index({}, text="[]"), "index.json", "JSON map")
case("index: not JSON", index({}, text="{"), "index.json", "not valid JSON")
case("index: missing shard", index(OK, files=("a",)), "b.safetensors", "missing")
case("index: tensor elsewhere", index({EMBED: "b.safetensors", NORM: "a.safetensors"}), EMBED, "does not hold it")
case("index: tensor forgotten", index({EMBED: "a.safetensors"} | {"x": "b.safetensors"}), "does not hold it")
case("index: link out of the folder", index(OK, link="../good/model.safetensors"), "link out of its folder")
case("index: link to a device", index(OK, link="/dev/zero"), "b.safetensors", "missing")
case("index: link to itself", index(OK, link="b.safetensors"), "b.safetensors", "missing")
case("index: a file name of 5000 letters", index(OK | {NORM: "b" * 5000}), "points outside")


def twice(here: Path):
    index(OK)(here)
    one = (here / "bad" / "a.safetensors").read_bytes()
    (here / "bad" / "b.safetensors").write_bytes(one)
    return ["merge", "m.yaml", "out"]


case("index: one tensor in two shards", twice, EMBED, "is also in")


def linked(here: Path):
    folder(here, "good")
    bad = folder(here, "bad", False)
    os.symlink(here / "good" / "model.safetensors", bad / "model.safetensors")
    return merge(here)


def piped(here: Path):
    folder(here, "good")
    os.mkfifo(folder(here, "bad", False) / "model.safetensors")
    return merge(here)


def sidecar(here: Path):
    """The tokenizer leads to a secret outside: the merge must not copy it."""
    for name in ("bad", "good"):
        folder(here, name)
    os.symlink("../../secret", here / "good" / "tokenizer.json")
    return merge(here)


def occupied(here: Path):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("irreplaceable")
    return merged()(here)


def through(here: Path):
    """The place to write is a link that leads out: what stands there is not ours."""
    (here.parent / "theirs").mkdir()
    (here.parent / "theirs" / "thesis.txt").write_text("irreplaceable")
    os.symlink("../theirs", here / "out")
    return merged()(here)


case("link: the weights lie elsewhere", linked, "link out of its folder")
case("link: the weights are a pipe", piped, "model.safetensors", "missing")
case("link: the tokenizer leads to a secret", sidecar, "link out of its folder")
case("output: a folder that is not ours", occupied, "not written by Luthier")
case("output: a link to a folder that is not ours", through, "not written by Luthier")


def heavy(here: Path):
    """As long as the format allows: 100 MB of names."""
    names = (f'"{i:06d}{"n" * 60}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(600_000))
    return merged(("{" + ",".join(names) + "}").encode(), data=0)(here)


case("header: 90 MB of names", heavy, "layer 0 of 1 has no tensors", memory=3000, cpu=40)
case("the model is a folder of nothing", lambda here: (
    folder(here, "good"), (here / "bad").mkdir(), merge(here))[-1], "holds no config.json")  # fmt: skip
case("the model is twice the same", lambda here: (folder(here, "good"), merge(
    here, MERGE.replace("./bad", "./good")))[-1])  # fmt: skip
assert CONFIG
