"""Checks of a recipe's pieces: each turns plain values into the object they stand for, or names the line at fault."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from luthier import catalogue, shapes
from luthier.engine.spec import MEMORY, SearchSpec, TrainSpec
from luthier.errors import LuthierError, said, unknown
from luthier.kit.pairing import one_for_each
from luthier.kit.paths import there
from luthier.recipe_text import Marked
from luthier.shapes import Method

DATA_ROLES, VALUE_ROLES = frozenset({"data"}), frozenset({"prompts", "problem"})
KEY_ROLES = frozenset({"key"})
DTYPES = ("auto", "fp32", "bf16", "fp16")
SOURCES = ("gym", "sos1k", "text", "jsonl")
MOST_THREADS = 1024
MOST_MULTIPLE = 1 << 16
UNITS = {"": 1, "B": 1} | {f"{p}{u}": b**e for e, p in enumerate("KMGT", 1) for u, b in (("B", 1000), ("iB", 1024))}


@dataclasses.dataclass(frozen=True)
class Role:
    """One input a method takes by name."""

    name: str
    many: bool
    optional: bool

    @property
    def kind(self) -> str:
        """model, data, value, or key: the path of a file whose content is a secret"""
        if self.name in KEY_ROLES:
            return "key"
        return "data" if self.name in DATA_ROLES else "value" if self.name in VALUE_ROLES else "model"


def roles_of(card: catalogue.Card) -> dict[str, Role]:
    """The roles of a method, from its card, else from its shape. `*` marks a list, `?` an optional one."""
    written = card.roles if card.roles is not None else getattr(shapes, card.shape).roles
    every = [Role(word.rstrip("*?"), "*" in word, "?" in word) for word in written]
    return {role.name: role for role in every}


def a_map(marked: Marked, value: Any, path: tuple, what: str) -> Mapping[str, Any]:
    """The value, which must be a map with words for keys; null counts as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LuthierError(f"{what} must be a map, got {said(value)}", where=marked.where(*path))
    for key in value:
        if not isinstance(key, str):
            raise LuthierError(f"the key {key!r} of {what} must be a word", where=marked.where(*path, key))
    return value


def keys(marked: Marked, value: Mapping[str, Any], path: tuple, known: Any, what: str) -> None:
    """Refuse keys that `known` does not hold."""
    for key in value:
        if key not in known:
            raise unknown(f"{what} key", key, known, where=marked.where(*path, key))


def method(marked: Marked, path: tuple, use: Any, values: Any, shape: str | None = None) -> Method:
    """The method `use` with the fields at `path` + ("set",), every fault placed at its line."""
    card = known_method(marked, (*path, "use"), use, shape)
    values = a_map(marked, values, (*path, "set"), f"set of {use}")
    _known_fields(marked, (*path, "set"), card, values)
    try:
        return catalogue.load(card.id, **values)
    except LuthierError as fault:
        raise placed(fault, marked, (*path, "set"), values) from None


def named_method(marked: Marked, path: tuple, value: Any, shape: str) -> Method:
    """A method given as an id or as {use, set}."""
    if isinstance(value, str):
        card = known_method(marked, path, value, shape)
        return catalogue.load(card.id)
    value = a_map(marked, value, path, path[-1])
    keys(marked, value, path, ("use", "set"), path[-1])
    if "use" not in value:
        raise LuthierError(f"{path[-1]} names no method", where=marked.where(*path), do="write use: ID")
    return method(marked, path, value["use"], value.get("set"), shape)


def known_method(marked: Marked, path: tuple, use: Any, shape: str | None = None) -> catalogue.Card:
    """The card of a method id; of this shape, if one is asked."""
    card = catalogue.known(use) if isinstance(use, str) else None
    if card is None:
        known = [c.id for c in catalogue.cards().values() if shape in (None, c.shape)]
        raise unknown("method", str(use), known, where=marked.where(*path))
    if shape and card.shape != shape:
        fits = ", ".join(c.id for c in catalogue.cards().values() if c.shape == shape)
        raise LuthierError(
            f"{use} is of shape {card.shape}, not {shape}", where=marked.where(*path), do=f"one of: {fits}"
        )
    return card


def _known_fields(marked: Marked, path: tuple, card: catalogue.Card, values: Mapping[str, Any]) -> None:
    known = [f.name for f in card.fields]
    for name, value in values.items():
        if name not in known:
            raise unknown(f"field of {card.id}", name, known, where=marked.where(*path, name))
        if isinstance(value, Mapping) and "use" in value and set(value) <= {"use", "set"}:
            inner = known_method(marked, (*path, name, "use"), value["use"])
            inside = a_map(marked, value.get("set"), (*path, name, "set"), f"set of {inner.id}")
            _known_fields(marked, (*path, name, "set"), inner, inside)


def placed(fault: LuthierError, marked: Marked, path: tuple, values: Mapping[str, Any]) -> LuthierError:
    """The fault at the line of the field it names, however deep, or of the whole map."""
    said = {*re.split(r"[.:\s]+", fault.where or ""), *re.findall(r"'([^']+)'", fault.what)}
    if not said & set(values):  # a fault of the whole record names its fields in plain words
        said |= set(re.findall(r"\w+", fault.what))
    here, node = [*path], values
    while isinstance(node, Mapping):
        inner = node.get("set")
        through = "set" if isinstance(inner, Mapping) and said & set(inner) else None
        name = next((n for n in node if n in said), through)
        if name is None:
            break
        here, node = [*here, name], node[name]
    where = marked.where(*here)
    return LuthierError(fault.what, where=f"{where}: {fault.where}" if fault.where else where, do=fault.do)


def slices(marked: Marked, path: tuple, value: Any, roles: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], ...]:
    """Which layers of which models a merge is made of: maps of a model's name to [first, past the last]."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise LuthierError(f"expected a list of slices, got {said(value)}", where=marked.where(*path),
                           do="write [{MODEL: [FIRST, PAST THE LAST]}, ...]")  # fmt: skip
    known, found = _merged(roles), []
    for i, one in enumerate(value):
        one = a_map(marked, one, (*path, i), "a slice")
        if not one:
            raise LuthierError("names no model", where=marked.where(*path, i))
        keys(marked, one, (*path, i), known, "slice")
        for name, layers in one.items():
            whole = isinstance(layers, list) and all(type(n) is int for n in layers)
            if not whole or len(layers) != 2 or not 0 <= layers[0] < layers[1]:
                what = f"expected [FIRST, PAST THE LAST], got {said(layers)}"
                raise LuthierError(what, where=marked.where(*path, i, name))
        found.append({name: (layers[0], layers[1]) for name, layers in one.items()})
    return tuple(found)


def tokenizer(marked: Marked, path: tuple, value: Any, roles: Mapping[str, Any]) -> tuple[str, int]:
    """Whose vocabulary a merge gets: base, union, or one of its models'; and of what its rows are a multiple."""
    multiple: Any = 1
    if isinstance(value, Mapping):
        keys(marked, a_map(marked, value, path, "tokenizer"), path, ("source", "pad_to_multiple_of"), "tokenizer")
        multiple = value.get("pad_to_multiple_of", 1)
        if type(multiple) is not int or not 1 <= multiple <= MOST_MULTIPLE:
            where = marked.where(*path, "pad_to_multiple_of")
            raise LuthierError(f"expected a number from 1 to {MOST_MULTIPLE}, got {said(multiple)}", where=where)
        path, value = (*path, "source"), value.get("source", "")
    if value is None:
        return "", 1
    known = ["union", *(["base"] if "base" in roles else []), *_merged(roles)]
    if not isinstance(value, str) or value not in known:
        raise unknown("tokenizer", str(value), known, where=marked.where(*path))
    return "base" if value == roles.get("base") else value, multiple


def _merged(roles: Mapping[str, Any]) -> list[str]:
    """The models of a merge by name."""
    experts = roles.get("experts", ())
    return [*([roles["base"]] if "base" in roles else []), *([experts] if isinstance(experts, str) else experts)]


def sources(marked: Marked, path: tuple, roles: Mapping[str, Any], use: str) -> None:
    """The data of a merge: one source for each expert, or one for all."""
    experts = roles["experts"]
    one_for_each(roles["data"], 1 if isinstance(experts, str) else len(experts), f"{marked.where(*path)}: {use}")


def problem(marked: Marked, path: tuple, value: Any) -> None:
    """A problem to certify: a polynomial as text or a number, or a map with the constraints beside it."""
    from luthier.kit.problem import problem as read

    try:
        parts = dict(value) if isinstance(value, Mapping) and value else {"polynomial": value}
        values = [parts.pop("polynomial", 0)]
        for each in values + [v for part in parts.values() for v in (part if isinstance(part, list) else [part])]:
            if not isinstance(each, (str, int, float)):
                raise LuthierError(f"expected a polynomial, got {said(each)}", do="write text such as x^2 + 1")
        read(value)
    except LuthierError as fault:
        raise fault.at(marked.where(*path)) from None


def train_fields() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(TrainSpec))


def search_fields() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(SearchSpec))


def train(marked: Marked, path: tuple, values: Any) -> TrainSpec:
    """The TrainSpec of a step."""
    return _spec(marked, path, values, TrainSpec)


def search(marked: Marked, path: tuple, values: Any) -> SearchSpec:
    """The SearchSpec of a step."""
    return _spec(marked, path, values, SearchSpec)


def _spec(marked: Marked, path: tuple, values: Any, kind: Any) -> Any:
    values = a_map(marked, values, path, kind.key)
    keys(marked, values, path, [f.name for f in dataclasses.fields(kind)], kind.key)
    try:
        return kind(**values)
    except LuthierError as fault:
        raise placed(fault, marked, path, values) from None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Where a run happens; outside every hash."""

    device: str = "auto"
    memory: int = MEMORY
    """bytes a streamed transform may hold"""
    threads: int | None = None


def hardware(marked: Marked, value: Any) -> Hardware:
    path = ("hardware",)
    value = dict(a_map(marked, value, path, "hardware"))
    keys(marked, value, path, ("device", "memory", "threads"), "hardware")
    device, threads = value.get("device", "auto"), value.get("threads")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", str(device)):
        raise unknown("device", str(device), ("auto", "cpu", "cuda", "cuda:0", "mps"), marked.where(*path, "device"))
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= MOST_THREADS):
        what = f"threads must be a whole number from 1 to {MOST_THREADS}, got {threads!r}"
        raise LuthierError(what, where=marked.where(*path, "threads"))
    memory = size(value.get("memory", MEMORY), marked.where(*path, "memory"))
    return Hardware(device, memory, threads)


def size(value: Any, where: str) -> int:
    """Bytes from a number or from words such as 1GiB or 500MB."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?i?B?)\s*", str(value))
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise LuthierError(f"{value!r} is no amount of memory", where=where, do="write it as 1GiB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def data_entry(marked: Marked, name: str, value: Any) -> dict[str, Any]:
    """One entry of `data`. Whether its files and families exist shows when it is opened, before any step."""
    from luthier.engine.data import check_data

    value = dict(a_map(marked, value, ("data", name), f"data {name!r}"))
    keys(marked, value, ("data", name), ("source", "split", "set", "answers", "form"), "data")
    kind, colon, _ = str(value.get("source", "")).partition(":")
    if colon and kind not in SOURCES and not there(str(value["source"])):
        raise unknown("kind of source", kind, SOURCES, where=marked.where("data", name, "source"))
    with at_data(marked, name):
        check_data(name, value)
    return value


@contextmanager
def at_data(marked: Marked, name: str) -> Iterator[None]:
    """Put the line in front of what is said of `data.NAME.key`."""
    try:
        yield
    except LuthierError as fault:
        said = (fault.where or "").removeprefix(f"data.{name}").lstrip(".: ")  # such as "split.test"
        place = marked.where("data", name, *re.split(r"[.:\s]+", said))
        raise LuthierError(fault.what, where=f"{place}: {said or name}", do=fault.do) from None


def new_sizes(marked: Marked, path: tuple, value: Any) -> dict[str, Any]:
    """The fields of a new model's configuration; vocab_size comes from the tokenizer."""
    from luthier.model.config import config_from

    value = dict(a_map(marked, value, path, "new"))
    try:
        config_from(value)
    except LuthierError as fault:
        raise placed(fault, marked, path, value) from None
    return value
