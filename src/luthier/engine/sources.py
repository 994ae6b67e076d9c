"""Text files cut into windows, and JSON lines: what `text:` and `jsonl:` data are made of."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from luthier.errors import LuthierError, nearest, said, unknown
from luthier.flows import Item
from luthier.kit.paths import there

CHARS = 1024
"""Characters of a window, by default: about 300 tokens."""

_SETTINGS = {"text": ("chars", "glob"), "jsonl": ()}
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_LINE_KEYS = ("text", "prompt", "answer", "completion", "messages")


def check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    """What may stand under `set` for text and jsonl."""
    for word, value in settings.items():
        if word not in _SETTINGS[kind]:
            raise unknown(f"setting of {kind} data", word, _SETTINGS[kind], where="set")
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (whole if word == "chars" else isinstance(value, str)):
            raise LuthierError(f"unfit value {value!r}", where=f"set.{word}")


def find(kind: str, place: str, settings: Mapping[str, Any]) -> Source:
    """The files behind `text:PLACE` or `jsonl:PLACE`; nothing is read yet."""
    if kind == "text" and place == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        pattern = settings.get("glob", "*.py")
        files = [p for p in _matching(root, pattern) if not _NOT_STDLIB & set(p.relative_to(root).parts)]
    else:
        root = there(place) or _nowhere(place)
        pattern = settings.get("glob", "*.jsonl" if kind == "jsonl" else "*")
        files = [p for p in _matching(root, pattern) if p.is_file()] if root.is_dir() else [root]
        if not root.is_dir() and not root.is_file():  # a pipe or a device has no end
            raise LuthierError(f"{place} is no plain file", where="source")
    if not files:
        raise LuthierError(f"no files {pattern} in {root}", where="source")
    return Source(kind, root, tuple(sorted(files)), settings.get("chars", CHARS))


def _nowhere(place: str) -> NoReturn:
    """The error for a path where nothing stands, with the nearest name beside it."""
    folder = there(os.path.dirname(place) or ".")
    beside = [p.name for p in folder.iterdir()] if folder and folder.is_dir() else []
    near = nearest(os.path.basename(place), beside)
    raise LuthierError(f"no file {said(place, 200)}", where="source", do=f"did you mean {near!r}?" if near else None)


def _matching(root: Path, pattern: str) -> Iterator[Path]:
    """The paths below `root` that a glob names; never others."""
    if ".." in Path(pattern).parts:
        raise LuthierError(f"the glob {said(pattern)} leads out of its folder", where="set.glob")
    try:
        yield from root.rglob(pattern)
    except (NotImplementedError, ValueError) as fault:
        what = f"{said(pattern)} is no glob ({fault})"
        raise LuthierError(what, where="set.glob", do="write one such as *.txt") from None


@dataclass(frozen=True)
class Source:
    """Files of text or of JSON lines."""

    kind: str
    root: Path
    files: tuple[Path, ...]
    chars: int

    def hash(self) -> str:
        """Hash of the files' contents, whatever they are called."""
        return hashlib.sha256("".join(sorted(h for h, _ in self._contents)).encode()).hexdigest()[:16]

    def items(self) -> Iterator[tuple[Item, str]]:
        """Every item with the hash of its file's content, in the order of file names."""
        read = windows if self.kind == "text" else lines
        for (digest, text), path in zip(self._contents, self.files, strict=True):
            if text is not None:
                for item in read(text, path, self.chars):
                    yield item, digest

    @cached_property
    def _contents(self) -> list[tuple[str, str | None]]:
        return [self._content(path) for path in self.files]

    def _content(self, path: Path) -> tuple[str, str | None]:
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()[:16]
        try:
            return digest, raw.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            if len(self.files) > 1 and self.kind == "text":
                return digest, None  # a folder may hold pictures
            raise LuthierError(f"not UTF-8 at byte {fault.start}", where=str(path)) from None


def windows(text: str, path: Path, chars: int) -> Iterator[Item]:
    """Stretches of at most `chars` characters that end at line ends; longer lines are cut."""
    pieces = [line[i : i + chars] for line in text.splitlines(True) for i in range(0, len(line), chars)]
    window, size, found = [], 0, []
    for piece in pieces:
        if window and size + len(piece) > chars:
            found.append("".join(window))
            window, size = [], 0
        window.append(piece)
        size += len(piece)
    found.append("".join(window))
    for place, text in enumerate(found):
        if text.strip():
            meta = {"file": path.name, "window": place, "continues": place + 1 < len(found)}
            yield Item(id=_digest(text), text=text, meta=meta)


def lines(text: str, path: Path, chars: int = 0) -> Iterator[Item]:
    """One item a line: {"text"}, {"prompt", "answer" or "completion"} or {"messages": [{"role", "content"}]}."""
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold what else counts as a line's end
        if line.strip():
            where = f"{path}:{number}"
            try:
                raw = json.loads(line)
                if "\\u" in line:
                    json.dumps(raw, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise LuthierError("not text: half of a surrogate pair", where=where) from None
            except (ValueError, RecursionError) as fault:
                raise LuthierError(f"not JSON: {getattr(fault, 'msg', fault)}", where=where) from None
            yield _line(raw, where, {"file": path.name, "line": number})


def _line(raw: Any, where: str, meta: Mapping[str, Any]) -> Item:
    if not isinstance(raw, dict):
        raise LuthierError("expected a JSON object", where=where)
    answer = raw.get("answer", raw.get("completion"))
    for key, value in (("text", raw.get("text")), ("prompt", raw.get("prompt")), ("answer", answer)):
        if value is not None and not isinstance(value, str):
            raise LuthierError(f"{key} is not a string", where=where)
    if raw.get("messages") is not None:
        turns = _turns(raw["messages"], where)
        said = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
        return Item(id=_digest(turns), messages=turns, answer=said, meta=meta)
    if raw.get("text") is not None:
        return Item(id=_digest(raw["text"]), text=raw["text"], meta=meta)
    if raw.get("prompt") is not None:
        return Item(id=_digest([raw["prompt"]]), prompt=raw["prompt"], answer=answer, meta=meta)
    raise unknown("kind of line with keys", ", ".join(map(str, raw)), _LINE_KEYS, where=where)


def _turns(raw: Any, where: str) -> tuple[Mapping[str, str], ...]:
    fits = isinstance(raw, list) and raw and all(isinstance(turn, dict) for turn in raw)
    if not fits or not all(isinstance(turn.get(key), str) for turn in raw for key in ("role", "content")):
        raise LuthierError('messages is not a list of {"role": ..., "content": ...}', where=where)
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in raw)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
