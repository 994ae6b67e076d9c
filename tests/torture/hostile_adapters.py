"""LoRA adapters and deltas, put on a good base in a merge."""

import json
import os
from pathlib import Path

from hostile import EMBED, NORM, case, entry, folder, merge, safetensors

RECIPE = "luthier: 1\nsteps:\n  m: {use: merge.task_arithmetic, base: ./good, experts: [./bad]}\n"
PEFT = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
A, B = (f"base_model.model.model.embed_tokens.lora_{x}.weight" for x in "AB")
PAIR = {A: entry([1, 2], [0, 8]), B: entry([3, 1], [8, 20])}


def on_base(here: Path):
    folder(here, "good", data=bytes(range(1, 25)) + bytes(8))
    (here / "bad").mkdir()
    return merge(here, RECIPE)


def lora(config=None, header=None, data=20, raw=None):
    def make(here: Path):
        command = on_base(here)
        text = raw if raw is not None else json.dumps(PEFT | (config or {}))
        (here / "bad" / "adapter_config.json").write_text(text)
        if header is not False:
            safetensors(here / "bad" / "adapter_model.safetensors", PAIR if header is None else header, data=data)
        return command

    return make


case("adapter: whole and good", lora())
for what, config, says in (
    ("another type", {"peft_type": "IA3"}, "only LORA is read"), ("no type", {"peft_type": None}, "only LORA is read"),
    ("DoRA", {"use_dora": True}, "use_dora"), ("biases", {"bias": "all"}, "bias"),
    ("rank 0", {"r": 0}, "r and lora_alpha"), ("rank a word", {"r": "x"}, "r and lora_alpha"),
    ("rank of 400 digits", {"r": 10**400}, "r and lora_alpha"),
    ("alpha negative", {"lora_alpha": -1}, "r and lora_alpha"),
    ("alpha of 400 digits", {"lora_alpha": 10**400}, "r and lora_alpha"),
    ("alpha that overflows", {"lora_alpha": 1e308}, "r and lora_alpha"),
    ("patterns a list", {"rank_pattern": [1]}, "rank_pattern"),
    ("patterns of words", {"alpha_pattern": {"embed_tokens": "x"}}, "alpha_pattern"),
    ("a pattern that is none", {"alpha_pattern": {"(": 2}}, "pattern"),
    ("a pattern that never ends", {"alpha_pattern": {"((((m|o|d|e|l|\\.|_|b|k|s|n|t)+)+)+)+!": 2}}, "pattern"),
    ("a pattern of fifty stars", {"alpha_pattern": {".*" * 50 + "!": 2}}, "pattern"),
    ("base model a path", {"base_model_name_or_path": "../../../etc/passwd"}, None),
):  # fmt: skip
    case(f"adapter: {what}", lora(config), *([says] if says else []))
case("adapter: settings a list", lora(raw="[]"), "adapter_config.json", "JSON map")
case("adapter: settings cut", lora(raw="{"), "adapter_config.json", "not valid JSON")
case("adapter: no weights", lora(header=False), "no adapter_model.safetensors")
case("adapter: empty", lora(header=b"{}", data=0), "not one tensor")
case("adapter: only one half", lora(header={A: entry([1, 2], [0, 8])}, data=8), "missing or do not match")
case("adapter: ranks that differ", lora(header={A: entry([2, 2], [0, 16]), B: entry([3, 1], [16, 28])}, data=28),
     "do not match")  # fmt: skip
case("adapter: of another shape", lora(header={A: entry([1, 9], [0, 36]), B: entry([9, 1], [36, 72])}, data=72),
     "[9, 9]", "[3, 2]")  # fmt: skip
case("adapter: a product of terabytes", lora(header={A: entry([1, 10**6], [0, 10**6], "F8_E5M2"),
     B: entry([10**6, 1], [10**6, 2 * 10**6], "F8_E5M2")}, data=2 * 10**6), "[1000000, 1000000]")  # fmt: skip
case("adapter: a tensor the base has not", lora(header={n.replace("embed", "evil"): e for n, e in PAIR.items()}),
     "unknown tensor")  # fmt: skip
case("adapter: a name without the prefix", lora(header={"x.lora_A.weight": entry([5], [0, 20])}), "does not begin")
case("adapter: NaN", lora(data=b"\xff" * 20), "NaN")
case("adapter: whole numbers", lora(header={A: entry([1, 2], [0, 8], "I32"), B: entry([3, 1], [8, 20], "I32")}), "I32")


def alone(here: Path, config=None, header=None, data=20):
    """Two adapters without a base, the second bad."""
    for name, changes in (("good", {}), ("bad", config or {})):
        (here / name).mkdir()
        (here / name / "adapter_config.json").write_text(json.dumps(PEFT | changes))
        entries = PAIR if name == "good" or header is None else header
        safetensors(here / name / "adapter_model.safetensors", entries, data=20 if name == "good" else data)
    return merge(here, "luthier: 1\nsteps:\n  m: {use: merge.linear, experts: [./good, ./bad]}\n")


case("adapters alone: whole and good", alone)
for what, given, says in (
    ("another alpha", {"config": {"lora_alpha": 2}}, "lora_alpha is 2"),
    ("a rank that is a list", {"config": {"r": [1]}}, "r and lora_alpha"),
    ("another base", {"config": {"base_model_name_or_path": "a/b"}}, None),
    ("DoRA", {"config": {"use_dora": True}}, "use_dora"),
    ("a pattern that is none", {"config": {"rank_pattern": {"(": 2}}}, "pattern"),
    ("another shape", {"header": {A: entry([1, 2], [0, 8]), B: entry([2, 1], [8, 16])}, "data": 16}, "[2, 1]"),
    ("only one half", {"header": {A: entry([1, 2], [0, 8])}, "data": 8}, "no such tensor"),
    ("one tensor too many", {"header": PAIR | {A + "x": entry([0], [20, 20])}}, "in this model only"),
    ("a name without the prefix", {"header": {"x.lora_A.weight": entry([5], [0, 20])}}, "does not begin"),
    ("whole numbers", {"header": {A: entry([1, 2], [0, 8], "I32"), B: entry([3, 1], [8, 20], "I32")}}, "I32"),
):  # fmt: skip
    case(f"adapters alone: {what}", lambda here, given=given: alone(here, **given), *([says] if says else []))


def pickled(here: Path):
    command = lora(header=False)(here)
    (here / "bad" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    return command


case("adapter: a pickle", pickled, "is a pickle")
INDEX, OLD, NEW = (f"{part}:{EMBED}" for part in ("index", "old", "new"))


def sparse(index="<i4", values=(0, 1), base=(0x04030201, 0x08070605), new=(1, 2), count=None):
    """Header and bytes of a delta of two entries; `base` are the bits that the base really has there."""
    import numpy as np

    raw = np.array(values, dtype=index).tobytes() + np.array(base, dtype="<u4").tobytes()
    raw += np.array(new, dtype="<f4").tobytes()
    n, wide = len(values), np.dtype(index).itemsize
    kind = {"<i4": "I32", "<i8": "I64", "<f4": "F32"}[index]
    spans = (n * wide, n * wide + 4 * len(base), n * wide + 4 * len(base) + 4 * len(new))
    return {INDEX: entry([n], [0, spans[0]], kind), OLD: entry([len(base)], [spans[0], spans[1]]),
            NEW: entry([len(new)], [spans[1], spans[2]])}, raw  # fmt: skip


def delta(about=None, made=None, shapes=None, raw=None):
    def make(here: Path):
        command = on_base(here)
        header, data = made or sparse()
        known = {"luthier_delta": 1, "kind": "sparse", "base": "", "notes": {}, "shapes": shapes or {EMBED: [3, 2]}}
        (here / "bad" / "delta.json").write_text(raw if raw is not None else json.dumps(known | (about or {})))
        safetensors(here / "bad" / "delta.safetensors", header, data=data)
        return command

    return make


case("delta: whole and good", delta())
for what, about, says in (
    ("another version", {"luthier_delta": 2}, "not a delta this version reads"),
    ("shapes a list", {"shapes": [1]}, "not a delta this version reads"),
    ("notes a word", {"notes": "x"}, "notes"),
):
    case(f"delta: {what}", delta(about), says)
for what, shape in {
    "a number": 6, "a word": "32", "of words": ["a", 10**12], "negative": [-3, -2], "of floats": [3.0, 2.0],
    "null": None, "enormous": [2**40, 2**40], "of booleans": [True, 6],
}.items():  # fmt: skip
    case(f"delta: shape {what}", delta(shapes={EMBED: shape}), EMBED)
for what, made in {
    "indices out of range": sparse(values=(0, 6)), "indices negative": sparse(values=(-1, 1)),
    "indices repeated": sparse(values=(1, 1)), "indices backwards": sparse(values=(1, 0)),
    "indices of floats": sparse(index="<f4"), "indices beyond 32 bits": sparse(index="<i8", values=(0, 2**40)),
    "more indices than values": sparse(values=(0, 1, 2)), "old and new of different length": sparse(new=(1, 2, 3)),
    "values before that are not the base's": sparse(base=(7, 7)),
}.items():  # fmt: skip
    case(f"delta: {what}", delta(made=made), EMBED)
case("delta: another hash of the base, the same values", delta({"base": "0" * 64}))
case("delta: NaN", delta(made=sparse(new=(float("nan"), 1))), "NaN")
case("delta: settings a list", delta(raw="[]"), "delta.json", "JSON map")
case("delta: no values", delta(made=({NORM: entry([2], [0, 8])}, bytes(8))), "missing or do not match")
case("delta: an unknown tensor", delta(shapes={"evil": [3, 2]}), "evil")


def linked(here: Path):
    command = delta()(here)
    os.rename(here / "bad" / "delta.safetensors", here / "elsewhere")
    os.symlink("../elsewhere", here / "bad" / "delta.safetensors")
    return command


case("delta: a link to values elsewhere", linked, "link out of its folder")
