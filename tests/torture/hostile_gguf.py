"""GGUF files, made value by value."""

import struct
from pathlib import Path

from hostile import case

U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
EMBED = ("token_embd.weight", (2, 3), 0)


def word(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    return word(key) + struct.pack("<I", kind) + value


def u32(key, value):
    return pair(key, U32, struct.pack("<I", value))


LLAMA = [
    pair("general.architecture", STRING, word("llama")), u32("llama.attention.head_count", 1),
    u32("llama.embedding_length", 2), u32("llama.feed_forward_length", 2), u32("llama.block_count", 1),
    u32("llama.context_length", 8),
]  # fmt: skip


def tensor(name, shape, kind, start):
    return word(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack(
        "<IQ", kind, start)  # fmt: skip


def gguf(pairs=(), tensors=(), data=24, magic=b"GGUF", version=3, counts=None):
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    raw = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(data)


def given(raw):
    def make(here: Path):
        (here / "m.gguf").write_bytes(raw)
        return ["generate", "./m.gguf", "one"]

    return make


ONE = [tensor("token_embd.weight", (2, 3), 0, 0)]
KEYS = {
    "empty": (b"", "cannot be read"),
    "bad magic": (gguf(magic=b"GGML"), "does not begin with GGUF"),
    "another version": (gguf(version=99), "version 99"),
    "absurd number of tensors": (gguf(counts=(2**63, 0)), "absurd"),
    "absurd number of keys": (gguf(counts=(0, 2**62)), "absurd"),
    "a million keys that are not there": (gguf(counts=(0, 1_000_000)), "m.gguf"),
    "cut after the counts": (gguf()[:24] + b"\1", "m.gguf"),
    "a word beyond the end": (gguf(counts=(0, 1))[:24] + struct.pack("<Q", 2**62), "beyond its end"),
    "a word that is no UTF-8": (gguf([word(b"\xff\xfe") + struct.pack("<I", U8) + b"\0"]), "damaged"),
    "a value of unknown kind": (gguf([pair("k", 77, b"")]), "unknown kind 77"),
    "a list beyond the end": (gguf([pair("k", ARRAY, struct.pack("<IQ", U8, 2**60))]), "beyond its end"),
    "a list whose bytes are beyond the end": (gguf([pair("k", ARRAY, struct.pack("<IQ", F32, 60))]), "m.gguf"),
    "lists 5000 deep": (gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)]), "damaged"),
    "alignment 0": (gguf([*LLAMA, u32("general.alignment", 0)], ONE), "alignment of 0"),
    "alignment a word": (gguf([pair("general.alignment", STRING, word("x"))], ONE), "alignment of 'x'"),
    "alignment beyond everything": (gguf([*LLAMA, u32("general.alignment", 2**31)], ONE), "truncated"),
    "nine axes": (gguf(LLAMA, [tensor("token_embd.weight", (1,) * 9, 0, 0)]), "9 axes"),
    "two billion axes": (gguf(LLAMA, [word("t") + struct.pack("<I", 2**31)]), "axes"),
    "a shape that overflows": (gguf(LLAMA, [tensor("token_embd.weight", (2**32, 2**32, 2), 0, 0)]), "truncated"),
    "zero by enormous": (gguf(LLAMA, [tensor("token_embd.weight", (0, 2**62, 2**62), 0, 0)]), "token_embd.weight"),
    "an offset beyond the end": (gguf(LLAMA, [tensor("token_embd.weight", (2, 3), 0, 2**50)]), "truncated"),
    "the same bytes for two tensors": (gguf(LLAMA, [*ONE, tensor("output.weight", (2, 3), 0, 0)]), "overlaps"),
    "a tensor twice": (gguf(LLAMA, ONE * 2), "twice"),
    "a tensor of unknown kind": (gguf(LLAMA, [tensor("token_embd.weight", (2, 3), 999, 0)]), "unknown kind 999"),
    "half a block": (gguf(LLAMA, [tensor("token_embd.weight", (2, 3), 8, 0)]), "no whole blocks"),
    "no architecture": (gguf([], ONE), "architecture None"),
    "another architecture": (gguf([pair("general.architecture", STRING, word("evil"))], ONE), "architecture 'evil'"),
    "an architecture of numbers": (gguf([u32("general.architecture", 3)], ONE), "architecture 3"),
    "no heads": (gguf([*LLAMA, u32("llama.attention.head_count", 0)], ONE), "head_count"),
    "heads by the billion": (gguf([*LLAMA, u32("llama.attention.head_count", 2**31)], ONE), "m.gguf"),
    "a tensor of no layer": (gguf(LLAMA, [tensor("../../x", (2, 3), 0, 0)]), "not part of a dense llama"),
    "a layer of 5000 digits": (gguf(LLAMA, [tensor(f"blk.{'9' * 5000}.attn_q.weight", (2, 3), 0, 0)]), "m.gguf"),
    "NaN in the weights": (gguf(LLAMA, ONE, 0) + struct.pack("<6f", *[float("nan")] * 6), "NaN"),
    "rope that is a word": (gguf([*LLAMA, pair("llama.rope.freq_base", STRING, word("x"))], ONE), "m.gguf"),
    "no tokenizer": (gguf(LLAMA, ONE), "tokenizer"),
    "a query that is no matrix": (gguf(LLAMA, [tensor("blk.0.attn_q.weight", (6,), 0, 0)]), "m.gguf"),
    "a query that does not divide": (gguf([*LLAMA, u32("llama.attention.head_count", 2)],
                                          [tensor("blk.0.attn_q.weight", (2, 3), 0, 0)]), "m.gguf"),
    "no tensors at all": (gguf(LLAMA), "m.gguf"),
}  # fmt: skip
for what, (raw, says) in KEYS.items():
    case(f"gguf: {what}", given(raw), says)


def tokens(*pairs):
    kind = pair("tokenizer.ggml.model", STRING, word("gpt2"))
    return gguf([*LLAMA, kind, pair("tokenizer.ggml.pre", STRING, word("smollm")), *pairs], ONE)


def words(key, values):
    return pair(key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(word, values)))


case("gguf: tokens that are numbers",
    given(tokens(pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", U8, 3) + b"abc"))),
     "m.gguf", "token")  # fmt: skip
case("gguf: tokens that are one number", given(tokens(u32("tokenizer.ggml.tokens", 3))), "m.gguf", "make no sense")
case("gguf: a token twice", given(tokens(words("tokenizer.ggml.tokens", ["a", "a", "b"]))), "m.gguf", "token")
case("gguf: merges of words that are not there", given(tokens(
    words("tokenizer.ggml.tokens", ["a", "b", "c"]), words("tokenizer.ggml.merges", ["x y", "z"]))), "m.gguf",
        "merges")  # fmt: skip
