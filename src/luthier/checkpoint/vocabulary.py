"""Vocabularies that differ: the rows of embeddings and heads matched by token before models are merged.

The output's vocabulary is the base's, another model's, or their union: the base's, then the added tokens
(such as those of chat templates) that it lacks. A model that lacks a token is given the base's row for it,
and where the base lacks it, too, the mean of the rows of those that have it. Rows that belong to no token
(padding) are matched by their number. Without a base its part is the first expert's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.checkpoint.anatomy import text_config
from luthier.checkpoint.reader import TensorInfo
from luthier.errors import LuthierError, said

ROLES = ("embed", "head", "head.bias")
SHARED = 0.99
"""Of the output's tokens, added ones apart, a model must know so many: below, the two split text differently."""
MOST = 200 << 20
"""Bytes of a tokenizer.json, at most; the largest in use have 35 million."""


class Vocabulary(NamedTuple):
    """Tokens by their row. tokens: also of padding, as numbers.  added: those outside the tokenizer's own model."""

    path: Path
    rows: Mapping[str | int, int]
    size: int
    added: frozenset[str]

    @property
    def tokens(self) -> list[str]:
        return [token for token in self.rows if isinstance(token, str)]


def vocabulary(source: Any) -> Vocabulary:
    """The tokens of a model with a tokenizer.json in its folder, and as many rows as its embedding has.

    LuthierError where there is none, or one that is larger than the embedding.
    """
    path = Path(source.path) / "tokenizer.json"
    if not path.is_file() and getattr(source, "base", None) is not None:  # an adapter speaks its base's words
        path = Path(source.base.path) / "tokenizer.json"
    try:
        if path.stat().st_size > MOST:
            raise LuthierError(f"has {path.stat().st_size:,} bytes", where=str(path))
        raw = json.loads(path.read_text(encoding="utf-8"))
        own = raw["model"]["vocab"]
        pairs = own.items() if isinstance(own, dict) else ((token, i) for i, (token, _) in enumerate(own))
        rows = {sys.intern(token): i for token, i in pairs}  # most models of a merge share most tokens
        added = {entry["content"]: entry["id"] for entry in raw.get("added_tokens") or ()}
    except FileNotFoundError:
        raise LuthierError("has no tokenizer.json", where=str(path.parent), do="rows cannot be matched") from None
    except (OSError, RecursionError, TypeError, ValueError, KeyError) as fault:
        raise LuthierError(f"is no tokenizer ({type(fault).__name__})", where=str(path)) from None
    size = _embedding(source).shape[0]
    fresh = frozenset(added.keys() - rows.keys())
    rows |= added
    if not all(isinstance(i, int) and i >= 0 for i in rows.values()):
        raise LuthierError("gives a token no row", where=str(path))
    if max(rows.values(), default=0) >= size:
        what = f"has {max(rows.values()) + 1} tokens, the embedding only {size} rows"
        raise LuthierError(what, where=str(path))
    used = set(rows.values())
    return Vocabulary(path, {**rows, **{i: i for i in range(size) if i not in used}}, size, fresh)


def united(base: Vocabulary, others: Sequence[Vocabulary]) -> tuple[Vocabulary, dict[str, Path]]:
    """The base's vocabulary with the added tokens of the others behind its last token, and where each is from.

    Padding of the base gives way to them. LuthierError where the others lack tokens of another kind.
    """
    rows, new = dict(base.rows), {}
    for other in others:
        foreign = [t for t in other.tokens if t not in rows and t not in other.added]
        if foreign:
            what = f"{len(foreign)} tokens such as {said(foreign[0], 40)} are not the base's, and no added ones"
            raise LuthierError(what, where=str(other.path), do="take one model's tokenizer: name it, or base")
        for token in sorted(other.added - rows.keys(), key=other.rows.__getitem__):
            rows[token] = max(row for t, row in rows.items() if isinstance(t, str)) + 1
            rows.pop(rows[token], None)
            new[token] = other.path
    size = max(base.size, *(row + 1 for row in rows.values()))
    return Vocabulary(base.path, rows, size, base.added | frozenset(new)), new


def padded(to: Vocabulary, multiple: int) -> Vocabulary:
    """With rows of padding up to a multiple."""
    size = math.ceil(to.size / multiple) * multiple
    return to._replace(rows={**to.rows, **{i: i for i in range(to.size, size)}}, size=size)


def check_known(to: Vocabulary, model: Vocabulary) -> None:
    """LuthierError unless the model knows nearly all tokens of the output, added ones apart."""
    tokens = [token for token in to.tokens if token not in to.added]
    known = sum(token in model.rows for token in tokens)
    if known < SHARED * len(tokens):
        what = f"knows {known:,} of the {len(tokens):,} tokens of {to.path.parent}"
        raise LuthierError(what, where=str(model.path), do="these models split text differently: they cannot be merged")


def check_equal(reference: Vocabulary, model: Vocabulary) -> None:
    """LuthierError where the same row means another token."""
    other = {row: token for token, row in model.rows.items()}
    for token, row in reference.rows.items():
        if isinstance(token, str) and isinstance(other.get(row), str) and other[row] != token:
            what = f"row {row} is {said(str(other[row]), 40)}, in {reference.path.parent} it is {said(token, 40)}"
            raise LuthierError(what, where=str(model.path), do="set tokenizer: base, union or a model's name")


class Matched:
    """A model whose embedding and head have the rows of another vocabulary; the rest is as it was.

    models: all models with their vocabularies, the base first, of whose rows those that this model lacks
    are made; it is number `own`.
    """

    def __init__(self, models: Sequence[tuple[Any, Vocabulary]], own: int, to: Vocabulary):
        self.source, self.to, self._sources = models[own][0], to, [model for model, _ in models]
        order = [own, *(n for n in range(len(models)) if n != own)]
        self._model = np.full(to.size, -1, dtype=np.int32)
        self._row = np.zeros(to.size, dtype=np.int64)
        self._mean: dict[int, list[tuple[int, int]]] = {}
        for token, row in to.rows.items():
            has = [(n, models[n][1].rows[token]) for n in order if token in models[n][1].rows]
            if has and (has[0][0] in (own, 0) or len(has) == 1):
                self._model[row], self._row[row] = has[0]
            elif has:
                self._mean[row] = has
        tokens = np.array([row for token, row in to.rows.items() if isinstance(token, str)], dtype=np.int64)
        self.lacked = int((self._model[tokens] != own).sum())
        """Tokens whose rows come from other models."""
        self.tensors = {name: self._sized(info) for name, info in self.source.tensors.items()}
        inner = {**text_config(self.source.config), "vocab_size": to.size}
        whole = "text_config" in self.source.config
        self.config = {**self.source.config, **({"text_config": inner} if whole else inner)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def _sized(self, info: TensorInfo) -> TensorInfo:
        if info.role not in ROLES:
            return info
        shape = (self.to.size, *info.shape[1:])
        return info._replace(shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        """Elements start … start+count of the flattened tensor with the rows of the new vocabulary."""
        info = self.tensors[name]
        if info.role not in ROLES:
            return self.source.read_flat(name, start, count)
        width = math.prod(info.shape[1:])
        first, past = start // width, -(-(start + count) // width)
        parts = self._runs(name, width, first, past)
        alike = all(part.dtype == info.dtype for part in parts)
        rows = torch.cat(parts if alike else [part.float() for part in parts])
        return rows[start - first * width : start - first * width + count]

    def _runs(self, name: str, width: int, first: int, past: int) -> list[Tensor]:
        """Rows first … past, one read for each stretch that lies together in one model."""
        model, row = self._model[first:past], self._row[first:past]
        breaks = np.flatnonzero((np.diff(model) != 0) | (np.diff(row) != 1)) + 1
        parts = []
        for a, b in zip([0, *breaks], [*breaks, past - first], strict=True):
            if model[a] >= 0:
                parts.append(self._read(int(model[a]), name, int(row[a]) * width, int(b - a) * width))
            else:
                parts += [self._made(name, width, at) for at in range(first + int(a), first + int(b))]
        return parts

    def _made(self, name: str, width: int, row: int) -> Tensor:
        """The mean of the rows of the models that have the token; zeros where nobody does."""
        has = self._mean.get(row, ())
        total = torch.zeros(width)
        for model, there in has:
            total += self._read(model, name, there * width, width).float()
        return total / max(1, len(has))

    def _read(self, model: int, name: str, start: int, count: int) -> Tensor:
        """Of another model; a head that is tied there is its embedding."""
        source = self._sources[model]
        return source.read_flat(name if name in source.tensors else _embedding(source).name, start, count)


def _embedding(source: Any) -> TensorInfo:
    found = next((info for info in source.tensors.values() if info.role == "embed"), None)
    if found is None:
        raise LuthierError("has no embedding that is known as one", where=str(source.path), do="rows cannot be matched")
    return found
