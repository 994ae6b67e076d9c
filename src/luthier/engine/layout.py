"""What stands between the models of a merge and the method: layers picked by slices, rows matched by token."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.checkpoint.reader import Checkpoint, inside
from luthier.checkpoint.vocabulary import (
    Matched,
    Vocabulary,
    check_equal,
    check_known,
    padded,
    united,
    vocabulary,
)
from luthier.engine.slices import Slice
from luthier.errors import LuthierError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Layout:
    """How the models of a merge lie beside each other.

    slices: layers of the output, see `engine.slices`.  tokenizer: None, where all must have one vocabulary;
    "base", "union", or the number of the expert whose vocabulary the output gets.  multiple: the rows of
    embeddings are padded up to a multiple of it.
    """

    slices: tuple[Slice, ...] = ()
    tokenizer: str | int | None = None
    multiple: int = 1


PLAIN = Layout()
"""All layers of models with one vocabulary."""


class Spoken:
    """The models of a merge in one vocabulary, and the tokenizer that goes with it."""

    def __init__(self, base: Any, experts: Sequence[Any], layout: Layout):
        self.base, self.experts = base, list(experts)
        self.home: Any = None
        self.new: dict[str, tuple[int, Path]] = {}
        self.notes: tuple[str, ...] = ()
        models = [*([base] if base is not None else []), *experts]
        if layout.tokenizer is None:
            _check_rows(models)
            return
        known = _known(models)
        to = self._chosen(known, layout, offset=base is not None)
        for _, other in known:
            check_known(to, other)
        to = padded(to, layout.multiple)
        same = [vocab.size == to.size and vocab.rows == to.rows for _, vocab in known]
        made = [m if alike else Matched(known, n, to) for n, (m, alike) in enumerate(zip(models, same, strict=True))]
        self.base, self.experts = (made[0], made[1:]) if base is not None else (None, made)
        self.notes = tuple(
            f"{Path(m.source.path).name} lacked {m.lacked} of {len(to.tokens)} tokens"
            for m in made if isinstance(m, Matched) and m.lacked
        )  # fmt: skip

    def _chosen(self, known: list[tuple[Any, Vocabulary]], layout: Layout, offset: bool) -> Vocabulary:
        if layout.tokenizer == "union":
            self.home = known[0][0]
            to, new = united(known[0][1], [vocab for _, vocab in known[1:]])
            self.new = {token: (to.rows[token], path) for token, path in new.items()}
            return to
        self.home, to = known[0 if isinstance(layout.tokenizer, str) else int(layout.tokenizer or 0) + offset]
        return to

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the special tokens of the tokenizer's own model."""
        theirs = getattr(self.home, "config", {})
        return {**config, **{key: theirs[key] for key in SPECIAL if key in theirs and key in config}}

    def put(self, folder: Path) -> None:
        """Write the tokenizer's files; those of another one that stand there go."""
        if self.home is None:
            return
        home = Path(vocabulary(self.home).path).parent
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
            if (home / name).is_file():
                shutil.copyfile(inside(home, name), folder / name)
        if self.new:
            _extend(folder, self.new)


def _known(models: Sequence[Any]) -> list[tuple[Any, Vocabulary]]:
    """Every model's vocabulary; rows that are alike, which are tens of megabytes, are held once."""
    known: list[tuple[Any, Vocabulary]] = []
    for model in models:
        one = vocabulary(model)
        rows = next((other.rows for _, other in known if other.rows == one.rows), one.rows)
        known.append((model, one._replace(rows=rows)))
    return known


def _extend(folder: Path, new: dict[str, tuple[int, Path]]) -> None:
    """Put added tokens of other tokenizers behind those of the one in `folder`, at the rows that were given them."""
    import transformers

    made: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = {
        path: transformers.AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False).added_tokens_decoder
        for path in {path for _, path in new.values()}
    }
    for token, (row, path) in new.items():
        entry = next((e for e in theirs[path].values() if e.content == token), token)
        made.add_tokens([entry], special_tokens=bool(getattr(entry, "special", False)))
        if made.convert_tokens_to_ids(token) != row:
            raise LuthierError(f"cannot take in the token {token!r} at row {row}", where=str(folder))
    made.save_pretrained(folder)


def _check_rows(models: Sequence[Any]) -> None:
    """LuthierError where models of one size mean different tokens by a row, as far as files tell."""
    speakers: dict[bytes, Any] = {}
    for model in models:
        file = Path(getattr(model, "path", "")) / "tokenizer.json"
        if isinstance(model, Checkpoint) and file.is_file():
            speakers.setdefault(file.read_bytes(), model)
    known: list[Vocabulary] = []
    for model in speakers.values() if len(speakers) > 1 else ():  # files that are alike need not be understood
        with suppress(LuthierError):  # what cannot be read cannot be compared; nothing is matched by it either
            known.append(vocabulary(model))
    for other in known[1:]:
        if other.size == known[0].size:
            check_equal(known[0], other)
