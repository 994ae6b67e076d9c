"""Data by name: where it comes from, how it is split, and that train and test share no item.

    sums: {source: "gym:chain_sum", set: {max_terms: 3}, split: {by: hash, train: 4000, test: 256}}
    code: {source: "text:stdlib", split: {by: file, test: 0.2}}
    mine: {source: "jsonl:chats.jsonl", split: {by: line, test: 100}}

`gym:` makes tasks (engine/tasks.py), `sos1k:` polynomials (engine/sos1k.py), `text:` cuts files into windows and
`jsonl:` reads lines (engine/sources.py). A path without a prefix is jsonl or text by its suffix. Which side an item
is on depends on a hash of its content (or of its file's) and on nothing else: not on order, seed or machine.
`answers: shuffled` is the control that teaches the format only: the training items get each other's
answers, the test items keep theirs. `form: text` joins a task's prompt and answer into one plain text,
to be learnt whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch

from luthier.engine import sources, tasks
from luthier.engine.splits import chosen, shuffle_answers, unique, unit
from luthier.errors import LuthierError, unknown
from luthier.fields import FrozenMap, coerce, hints
from luthier.flows import Ctx, Item

TEST_SHARE = 0.25
"""The part of all possible gym items that is for testing only, whatever the counts asked for, so that no
other recipe's training data can hold this one's test items."""

MADE = ("gym", "sos1k")  # as many items as are asked for
_BY = {"gym": ("hash",), "sos1k": ("hash",), "text": ("file", "window"), "jsonl": ("line",)}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """An entry under `data:` in a recipe, checked. Nothing is read or generated yet."""

    source: str
    """gym:FAMILY, sos1k:LEVEL, text:stdlib, text:PATH, jsonl:PATH or PATH"""
    split: Mapping[str, Any] = field(default_factory=FrozenMap)
    """by: hash | file | window | line; train and test: counts of items, or shares of the source"""
    set: Mapping[str, Any] = field(default_factory=FrozenMap)
    """the source's own arguments: a family's generator settings; for text `chars` a window and `glob`"""
    answers: Literal["true", "shuffled"] = "true"
    """shuffled: right format, wrong content"""
    form: Literal["task", "text"] = "task"
    """text: prompt and answer as one plain text, with a loss on all of it (gym only)"""

    def __post_init__(self) -> None:
        for name, kind in hints(type(self)).items():
            try:
                object.__setattr__(self, name, coerce(getattr(self, name), kind))
            except LuthierError as fault:
                raise fault.at(name) from None
        for word in self.split:
            if word not in ("by", "train", "test"):
                raise unknown("key", word, ("by", "train", "test"), where="split")
        if self.by not in (None, *_BY[self.kind]):
            raise unknown("way to split", str(self.by), _BY[self.kind], where="split.by")
        for side in ("train", "test"):
            self._check_size(side, self.split.get(side))
        if self.kind not in MADE:
            sources.check_settings(self.kind, self.set)
        if self.kind != "gym" and self.form != "task":
            raise LuthierError(f"{self.form!r} is for gym tasks", where="form", do="drop it")

    def _check_size(self, side: str, size: Any) -> None:
        number = isinstance(size, (int, float)) and not isinstance(size, bool)
        fits = size is None or number and (size >= 0 if isinstance(size, int) else 0 <= size <= 1)
        if not fits or (self.kind in MADE and isinstance(size, float)):
            what = "a count" if self.kind in MADE else "a count (whole number) or a share (0.0 to 1.0)"
            raise LuthierError(f"expected {what}, got {size!r}", where=f"split.{side}")

    @property
    def kind(self) -> str:
        """gym, sos1k, text or jsonl"""
        prefix = self.source.split(":", 1)[0]
        if prefix in _BY and ":" in self.source:
            return prefix
        return "jsonl" if self.source.endswith((".jsonl", ".ndjson")) else "text"

    @property
    def place(self) -> str:
        """The family or path, without the prefix."""
        return self.source.split(":", 1)[1] if self.source.split(":", 1)[0] in _BY else self.source

    @property
    def by(self) -> str | None:
        return self.split.get("by")


def check_data(name: str, spec: str | Mapping[str, Any] | DataSpec) -> DataSpec:
    """A recipe's data entry, checked without reading anything; errors name `data.NAME.key`."""
    if isinstance(spec, DataSpec):
        return spec
    spec = {"source": spec} if isinstance(spec, str) else dict(spec)
    known = [f.name for f in fields(DataSpec)]
    for word in spec:
        if word not in known:
            raise unknown("key", word, known, where=f"data.{name}")
    if "source" not in spec:
        raise LuthierError("no source", where=f"data.{name}", do="write source: gym:FAMILY, text:PATH or jsonl:PATH")
    try:
        return DataSpec(**spec)
    except LuthierError as fault:
        raise fault.at(f"data.{name}") from None


def open_data(name: str, spec: str | Mapping[str, Any] | DataSpec, ctx: Ctx) -> OpenData:
    """The data `name` of a recipe. Wrong names fail here; items are made when first asked for."""
    checked = check_data(name, spec)
    try:
        return _OPEN[checked.kind](name, checked, ctx)
    except LuthierError as fault:
        raise fault.at(f"data.{name}") from None


class OpenData:
    """A `flows.Data` that makes its items when they are first looked at."""

    scored = False

    def __init__(self, name: str, spec: DataSpec, ctx: Ctx):
        self.name, self.spec, self._ctx = name, spec, ctx

    @property
    def train(self) -> Sequence[Item]:
        return self._train

    @cached_property
    def _train(self) -> Sequence[Item]:
        items = self._sides[0]
        return shuffle_answers(items, self._key) if self.spec.answers == "shuffled" else items

    @property
    def test(self) -> Sequence[Item]:
        return self._sides[1]

    def score(self, item: Item, output: str) -> float:
        raise LuthierError(f"{self.name} holds no answers to score", do="measure it with eval.perplexity")

    def overlap(self) -> int:
        """How many test items are also in train: zero, or the split is broken."""
        return len({item.id for item in self.train} & {item.id for item in self.test})

    def hash(self) -> str:
        """Hash of everything the items depend on; part of a step's hash."""
        made = [self._content(), dict(self.spec.split), dict(self.spec.set), self.spec.answers]
        made += [self.spec.form] if self.spec.form != "task" else []
        return hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:16]

    @property
    def _key(self) -> int:
        """Seed of what is drawn: from the root seed and the source, so that all steps see the same items."""
        text = json.dumps([self._ctx.seed, self.spec.source, dict(self.spec.set)], default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    @cached_property
    def _sides(self) -> tuple[list[Item], list[Item]]:
        raise NotImplementedError

    def _content(self) -> Any:
        raise NotImplementedError


class GymData(OpenData):
    """Tasks made by a reasoning-gym family."""

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """Whether the items are tasks, not texts."""
        return self.spec.form == "task"

    @property
    def train(self) -> Sequence[Item]:
        return self._formed[0]

    @property
    def test(self) -> Sequence[Item]:
        return self._formed[1]

    @cached_property
    def _formed(self) -> tuple[Sequence[Item], Sequence[Item]]:
        sides = self._train, self._sides[1]
        if self.spec.form == "task":
            return sides
        return tuple([replace(i, text=f"{i.prompt}\n{i.answer}", prompt=None, answer=None) for i in s] for s in sides)  # type: ignore[return-value]

    def __init__(self, name: str, spec: DataSpec, ctx: Ctx):
        super().__init__(name, spec, ctx)
        self.family = spec.place
        self._wanted = (int(spec.split.get("train", 0)), int(spec.split.get("test", 256)))
        most = 200 + 40 * max(sum(self._wanted), 1)
        self._dataset = tasks.generator(self.family, self._key, most, dict(spec.set))

    def score(self, item: Item, output: str) -> float:
        return tasks.score(self._dataset, item, output)

    def _content(self) -> Any:
        from importlib.metadata import version

        return ["gym", self.family, self._key, version("reasoning-gym")]

    @cached_property
    def _sides(self) -> tuple[list[Item], list[Item]]:
        key = {"data": self.hash(), "wanted": self._wanted}
        stored = self._ctx.cached("gym", key, lambda: {"json": _to_bytes(self._generate())})
        train, test = (
            [Item(**fields_) for fields_ in side] for side in json.loads(bytes(stored["json"].numpy()).decode())
        )
        return train, test

    def _generate(self) -> tuple[list[Item], list[Item]]:
        sides: tuple[list[Item], list[Item]] = ([], [])
        seen: set[str] = set()
        if self.family in tasks.SLOW:
            self._ctx.emit("log", text=f"{self.name}: gym:{self.family} is slow to make, {sum(self._wanted)} items")
        for item in tasks.items(self._dataset, self.family):
            side = int(unit(item.id) < TEST_SHARE)
            if item.id not in seen and len(sides[side]) < self._wanted[side]:
                sides[side].append(item)
            seen.add(item.id)
            if (len(sides[0]), len(sides[1])) == self._wanted:
                return sides
        raise LuthierError(
            f"gym:{self.family} gave only {len(sides[0])} training and {len(sides[1])} test items that differ"
            f" in {self._dataset.size} tries",
            where=f"data.{self.name}.split", do="ask for fewer, or widen its settings under set",
        )  # fmt: skip


class StoredData(OpenData):
    """Text files or JSON lines."""

    def __init__(self, name: str, spec: DataSpec, ctx: Ctx):
        super().__init__(name, spec, ctx)
        self.source = sources.find(spec.kind, spec.place, dict(spec.set))
        by = spec.by or ("file" if spec.kind == "text" and len(self.source.files) > 1 else _BY[spec.kind][-1])
        if by == "file" and len(self.source.files) < 2:
            raise LuthierError(f"{spec.place} is one file", where="split.by", do="split it by window")
        self._whole_files = by == "file"

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """Whether every test item is a prompt with an answer."""
        return bool(self.test) and all(item.prompt is not None and item.answer for item in self.test)

    def score(self, item: Item, output: str) -> float:
        if not item.prompt or not item.answer:
            return super().score(item, output)
        found = tasks.extract(output, item.answer) or ""
        return float(_bare(item.answer) in (_bare(found), _bare(output)))

    def _content(self) -> Any:
        return self.source.hash()

    @cached_property
    def _sides(self) -> tuple[list[Item], list[Item]]:
        groups: dict[str, list[Item]] = {}  # what must stay together: a file, or a single item
        for item, file_hash in self.source.items():
            groups.setdefault(file_hash if self._whole_files else item.id, []).append(item)
        names = sorted(groups)
        test_names = chosen(names, self.spec.split.get("test", 0.1), lambda name: len(groups[name]))
        left = [name for name in names if name not in test_names]
        test = unique((item for name in names if name in test_names for item in groups[name]), set())
        train = unique((item for name in left for item in groups[name]), {item.id for item in test})
        size = self.spec.split.get("train")
        if size is not None:
            train = train[: size if isinstance(size, int) else round(size * (len(train) + len(test)))]
        if isinstance(self.spec.split.get("test"), int):
            test = test[: self.spec.split["test"]]
        if not test and self.spec.split.get("test") != 0:
            what = f"{self.spec.place} has too little for a test set"
            raise LuthierError(what, where=f"data.{self.name}.split", do="give test a count")
        return train, test


def _sos1k(*given: Any) -> OpenData:
    from luthier.engine.sos1k import SosData  # which is made of what stands here

    return SosData(*given)


_OPEN: Mapping[str, Callable[[str, DataSpec, Ctx], OpenData]]
_OPEN = {"gym": GymData, "sos1k": _sos1k, "text": StoredData, "jsonl": StoredData}


def _to_bytes(sides: Any) -> torch.Tensor:
    plain = [[{"id": i.id, "prompt": i.prompt, "answer": i.answer, "meta": dict(i.meta)} for i in s] for s in sides]
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(" .\"'`").casefold()
