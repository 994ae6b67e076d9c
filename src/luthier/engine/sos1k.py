"""Data that asks of polynomials whether they are sums of squares, with answers that are certificates.

    sos: {source: "sos1k:reasoning", set: {chars: 200, classes: [2a, 2b]}, split: {train: 400, test: 190}}

The level (plain, simple, reasoning) is how it is asked; the polynomials, their answers and their side of the split
are the same at all levels. `classes` are those of `kit.sos1k`, all by default; `chars` is the longest text; they come
in the proportions of the paper's table, or with `equal: true` as many of each. An answer is what a certificate says
that the verifier accepts: of the construction, or of `sos.sos1k`. A polynomial that neither decides is left out, and
counted in `dropped`. A class tells how an item was made, not its answer: of 5.2b some are sums of squares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any

import torch

from luthier.catalogue import load
from luthier.engine import tasks
from luthier.engine.data import TEST_SHARE, DataSpec, OpenData
from luthier.engine.splits import unit
from luthier.errors import LuthierError, said, unknown
from luthier.flows import Certificate, Ctx, Item
from luthier.kit.context import Context
from luthier.kit.sos1k import CHARS, SIZES, Drawn, draw, order, truth
from luthier.kit.sos1k_prompts import LEVELS, prompt

SETTINGS = ("chars", "classes", "equal")
SAID = {True: "Yes", False: "No"}
METHOD = "sos.sos1k"
MOST_TRIES = 40
"""Polynomials drawn for each item that is wanted, at most."""
Sides = tuple[list[Any], list[Any], dict[str, int]]
"""(id, text, answer, class, number, proof) of each training and test item; what was left out."""


class SosData(OpenData):
    """Polynomials of SoS-1K's classes, drawn anew."""

    scored = True

    def __init__(self, name: str, spec: DataSpec, ctx: Ctx):
        super().__init__(name, spec, ctx)
        if spec.place not in LEVELS:
            raise unknown("level", spec.place, list(LEVELS), where="source")
        for word in spec.set:
            if word not in SETTINGS:
                raise unknown("setting of sos1k", word, SETTINGS, where="set")
        self._chars = spec.set.get("chars", CHARS)
        if not isinstance(self._chars, int) or isinstance(self._chars, bool) or not 20 <= self._chars <= 10 * CHARS:
            raise LuthierError(f"expected a count from 20 to {10 * CHARS}, got {said(self._chars)}", where="set.chars")
        self._classes = _classes(spec.set.get("classes", tuple(SIZES)))
        self._equal = spec.set.get("equal", False)
        if not isinstance(self._equal, bool):
            raise LuthierError(f"expected true or false, got {said(self._equal)}", where="set.equal")
        self._wanted = (int(spec.split.get("train", 0)), int(spec.split.get("test", 190)))

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many polynomials of each class were left out, since nothing decides them."""
        return self._made[2]

    def score(self, item: Item, output: str) -> float:
        return float(tasks.extract(output, item.answer) == item.answer)

    def certificate(self, item: Item) -> Certificate:
        """What proves an item's answer, made again from its class and number."""
        made = certified(draw(item.meta["class"], self._chars, _rng(self._key, item.meta["class"], item.meta["index"])))
        if made is None:
            raise LuthierError(f"item {item.id} is not of this data", where=self.name)
        return made

    @property
    def _key(self) -> int:
        """From the root seed alone: a class's polynomials are the same at all levels and whatever else is asked."""
        return int.from_bytes(hashlib.sha256(f"sos1k {self._ctx.seed}".encode()).digest()[:4], "big") >> 1

    def _content(self) -> Any:
        return ["sos1k", self._key, version("luthier"), prompt(self.spec.place, "")]

    @property
    def _sides(self) -> tuple[list[Item], list[Item]]:
        return self._made[:2]

    @cached_property
    def _made(self) -> tuple[list[Item], list[Item], Mapping[str, int]]:
        asked = (self._key, self._chars, self._classes, self._equal, self._wanted)
        try:
            key = {"asked": asked, "version": version("luthier")}
            stored = self._ctx.cached("sos1k", key, lambda: {"json": _packed(generate(*asked))})
        except LuthierError as fault:
            raise fault.at(f"data.{self.name}") from None
        train, test, dropped = json.loads(bytes(stored["json"].numpy()).decode())
        if dropped:
            self._ctx.emit("log", text=f"{self.name}: left out as undecided: {dropped}")
        return [self._item(*one) for one in train], [self._item(*one) for one in test], dropped

    def _item(self, id_: str, text: str, answer: str, kind: str, number: int, proof: str) -> Item:
        meta = {"class": kind, "index": number, "problem": text, "proof": proof}
        return Item(id=id_, prompt=prompt(self.spec.place, text), answer=answer, meta=meta)


def certified(drawn: Drawn) -> Certificate | None:
    """The construction's proof if it is one, else the cascade's; None where neither decides."""
    proof = drawn.proof()
    if proof is not None and truth(proof) is not None:
        return proof
    made = load(METHOD).certify(drawn.text, Context(step="sos1k"))
    return made if truth(made) is not None else None


def _rng(key: int, kind: str, number: int) -> torch.Generator:
    return Context(seed=key).rng(kind, number)


@lru_cache(maxsize=4)
def generate(key: int, chars: int, classes: tuple[str, ...], equal: bool, wanted: tuple[int, int]) -> Sides:
    """The items of both sides, and how many polynomials of each class were left out. All levels ask for the same."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    dropped: dict[str, int] = {}
    seen: set[str] = set()
    for tries, (kind, number) in enumerate(order(classes, equal)):
        if (len(sides[0]), len(sides[1])) == wanted:
            break
        if tries > 200 + MOST_TRIES * sum(wanted):
            what = f"only {len(sides[0])} training and {len(sides[1])} test items that differ in {tries} tries"
            raise LuthierError(what, where="split", do="ask for fewer, or allow more classes")
        drawn = draw(kind, chars, _rng(key, kind, number))
        id_ = hashlib.sha256(drawn.text.encode()).hexdigest()[:16]
        side = int(unit(id_) < TEST_SHARE)
        if id_ in seen or len(sides[side]) == wanted[side]:
            continue
        seen.add(id_)
        made = certified(drawn)
        if made is None:
            dropped[kind] = dropped.get(kind, 0) + 1
        else:
            sides[side].append((id_, drawn.text, SAID[bool(truth(made))], kind, number, made.reason.split(":")[0]))
    return *sides, dropped


def _classes(asked: Any) -> tuple[str, ...]:
    """The classes by name, in the table's order. YAML reads 1 as a number."""
    several = [str(one) for one in (asked if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked])]
    for one in several:
        if one not in SIZES:
            raise unknown("class", one, list(SIZES), where="set.classes")
    if not several:
        raise LuthierError("no class", where="set.classes")
    return tuple(one for one in SIZES if one in several)


def _packed(made: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(made).encode()), dtype=torch.uint8)
