"""A tokenizer as a GGUF keeps it: tokens by row, kinds, merges, special ids, chat template, and how text is split.

llama.cpp does not read the rules by which text is split into words; it has them by name, in code. Here the
name is found by the rules themselves, so a trained or enlarged vocabulary keeps it. A tokenizer whose rules
have no name there would read other tokens than the model was trained on: it is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from luthier.errors import LuthierError, said

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""kinds of tokens, by GGUF's numbers"""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _ALONE = ("ByteLevel", False, True), ("ByteLevel", False, False)
_SPLITS: Mapping[tuple[Any, ...], str] = {
    (_BYTES, False): "gpt-2",
    (("Digits", True), _BYTES, False): "smollm",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), _ALONE, True): "llama-bpe",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), _ALONE, False): "smaug-bpe",
    (("Split", _WORDS + r"\p{N}" + _REST), _ALONE, False): "qwen2",
}
"""the steps that split text, and whether a whole word that is a token is taken as it is → llama.cpp's name"""


class Vocabulary(NamedTuple):
    """tokens, kinds: by row.  scores: by row, of a SentencePiece tokenizer.  ids: bos, eos, ... → id.
    adds: bos, eos → whether encoding a text adds it."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str]
    ids: dict[str, int]
    adds: dict[str, bool]
    template: Any


def vocabulary(folder: str | os.PathLike[str], rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """What a GGUF says of the tokenizer in `folder`, for an embedding of so many rows.

    Raises LuthierError for a tokenizer llama.cpp has no rules for, and for one with more tokens than rows.
    """
    from transformers import AutoTokenizer

    where = f"{folder}: tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        raw = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # each library on the way has its own
        why = said(" ".join(str(error).split()), 120)
        raise LuthierError(
            f"cannot be read ({why})", where=where, do="a GGUF holds its tokenizer: save it beside"
        ) from None
    if raw["model"].get("type") != "BPE":
        raise LuthierError(f"is of the kind {said(raw['model'].get('type'))}; BPE is written", where=where)
    pieces = raw["model"].get("byte_fallback") is True
    pre = _check_pieces(raw, where) if pieces else _name_of_splits(raw, where)
    tokens, kinds = _tokens(raw, tokenizer.get_vocab(), rows, pieces, where)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in raw["model"]["merges"]]
    ids = _special(tokenizer, config, rows)
    return Vocabulary(
        "llama" if pieces else "gpt2", pre, tokens, kinds, _scores(tokens, kinds, merges) if pieces else None,
        [] if pieces else [" ".join(pair) for pair in merges], ids, _added(tokenizer, ids), _template(tokenizer),
    )  # fmt: skip


def _name_of_splits(raw: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for how a byte-level BPE splits text."""
    first = raw.get("pre_tokenizer") or {}
    steps = [_step(one) for one in first.get("pretokenizers", [first])]
    normal, model = raw.get("normalizer"), raw["model"]
    odd = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
    if normal is not None and normal.get("type") != "NFC":  # which leaves nearly all text as it is
        raise LuthierError(f"rewrites text by {said(normal.get('type'))}, llama.cpp does not", where=where)
    name = _SPLITS.get((*steps, bool(model.get("ignore_merges"))))
    if name is None or odd:
        what = f"splits text by rules llama.cpp has no name for ({said(steps, 120)})"
        raise LuthierError(what, where=where, do=f"known: {', '.join(sorted(_SPLITS.values()))}")
    return name


def _step(one: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = one.get("type")
    if kind == "ByteLevel":
        return kind, one.get("add_prefix_space"), one.get("use_regex", True)
    if kind == "Digits":
        return kind, one.get("individual_digits")
    if kind == "Split" and one.get("behavior") == "Isolated" and not one.get("invert"):
        return kind, one["pattern"].get("Regex")
    return kind, "in a way of its own"


def _check_pieces(raw: Mapping[str, Any], where: str) -> str:
    """A SentencePiece tokenizer turns spaces to ▁, puts one in front, and does nothing else to text."""
    normal, before = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    front = [{"type": "Prepend", "prepend": "▁"}, space]
    meta = {"type": "Metaspace", "replacement": "▁", "split": False}
    by_normal = not before and normal.get("normalizers") == front
    by_split = not normal and {k: before.get(k) for k in meta} == meta
    by_split = by_split and before.get("prepend_scheme") in ("first", "always")
    if not (by_normal or by_split):
        raise LuthierError("rewrites or splits text in a way llama.cpp's SentencePiece does not", where=where)
    return "default"


def _tokens(
    raw: Mapping[str, Any], known: Mapping[str, int], rows: int, pieces: bool, where: str
) -> tuple[list[str], list[int]]:  # fmt: skip
    """Token and kind of every row of the embedding; rows without a token are padding."""
    if not known or max(known.values()) >= rows:
        what = f"its largest id is {max(known.values(), default=-1):,}, the embedding has {rows:,} rows"
        raise LuthierError(what, where=where, do="the tokenizer belongs to another model")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in known.items():
        byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], kinds[i] = token, BYTE if byte else NORMAL
    for added in raw.get("added_tokens", ()):
        kinds[added["id"]] = CONTROL if added["special"] or _looks_special(added["content"]) else USER
    unknown = raw["model"].get("unk_token")
    if pieces and unknown in known:
        kinds[known[unknown]] = UNKNOWN
    return tokens, kinds


def _looks_special(token: str) -> bool:
    """Some models' control tokens are not marked as such; llama.cpp's converter goes by their look, too."""
    return token in ("<pad>", "<mask>") or (token.startswith("<|") and token.endswith("|>"))


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """A SentencePiece score orders merges: less the later a token's first merge comes."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    last = len(merges)
    return [-float(first.get(t, last)) if k == NORMAL else 0.0 for t, k in zip(tokens, kinds, strict=True)]


def _special(tokenizer: Any, config: Mapping[str, Any], rows: int) -> dict[str, int]:
    """Ids of the special tokens: the tokenizer's, else config.json's."""
    found = {}
    for word in ("bos", "eos", "unk", "pad"):
        i = getattr(tokenizer, f"{word}_token_id", None)
        i = config.get(f"{word}_token_id") if i is None else i
        if type(i) is int and 0 <= i < rows:
            found[word] = i
    return found


def _added(tokenizer: Any, ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether a text gets bos in front and eos behind: seen by encoding one."""
    seen = tokenizer("a").input_ids
    return {"bos": seen[:1] == [ids.get("bos")], "eos": len(seen) > 1 and seen[-1:] == [ids.get("eos")]}


def _template(tokenizer: Any) -> Any:
    """The chat template as GGUF's writer takes it: a text, or a list of named ones."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
