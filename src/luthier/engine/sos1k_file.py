"""The published evaluation file of SoS-1K, checked: every label that a certificate contradicts.

    from luthier.engine.sos1k_file import check
    print(check("evaluation.jsonl"))

The file (repository Joe-2002/SoS1, data/evaluation/evaluation.jsonl) holds one object a line with the keys
`polynomial` (x1 or x(1)), `ans` (1: a sum of squares, 0: none), `label` (the class) and three more, which are not
looked at. What a label says is about the polynomial as printed: coefficients were rounded for print, and a sum of
squares need not be one afterwards. Polynomials of 32,767 characters were cut off, which is what a cell of a spreadsheet
holds; they are named, and not decided.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.catalogue import load
from luthier.errors import LuthierError, said
from luthier.flows import Certificate
from luthier.kit.context import Context
from luthier.kit.paths import there
from luthier.kit.sos1k import truth
from luthier.shapes import Certify

KEYS = {"polynomial": str, "ans": int, "label": str}
WAY = {"certifier": {"use": "sos.certify", "set": {"multipliers": 0, "largest": 45}}}
"""The cascade's settings: a Gram matrix of 45 takes a second or so, of 100 minutes."""
MOST_BYTES, CELL = 1 << 28, 32_767


@dataclass(frozen=True)
class Line:
    """A line of the file. says: what its label says; truth: what the certificate proves, None if nothing does."""

    number: int
    label: str
    says: bool
    truth: bool | None
    why: str
    certificate: Certificate | None

    @property
    def contradicted(self) -> bool:
        return self.truth is not None and self.truth != self.says

    def __str__(self) -> str:
        words = {True: "a sum of squares", False: "no sum of squares", None: "undecided"}
        return f"line {self.number}: {self.label} says {words[self.says]}; it is {words[self.truth]}: {self.why}"


@dataclass(frozen=True)
class Checked:
    """What came of every line."""

    lines: tuple[Line, ...]

    @property
    def decided(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.truth is not None)

    @property
    def contradicted(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.contradicted)

    def by_class(self) -> dict[str, dict[str, int]]:
        """{label: {agree, contradicted, undecided}}, in the order of the labels."""
        every = {label: Counter() for label in sorted({line.label for line in self.lines})}
        for line in self.lines:
            word = "contradicted" if line.contradicted else "undecided" if line.truth is None else "agree"
            every[line.label][word] += 1
        return {
            label: {word: seen[word] for word in ("agree", "contradicted", "undecided")}
            for label, seen in every.items()
        }

    def __str__(self) -> str:
        agree = len(self.decided) - len(self.contradicted)
        head = (
            f"{len(self.lines)} lines, {len(self.decided)} decided: {agree} agree, "
            f"{len(self.contradicted)} are contradicted by a certificate"
        )
        return "\n".join([head, *map(str, self.contradicted)])


def check(path: Any, method: Any = None, watch: Callable[[Mapping[str, Any]], None] | None = None) -> Checked:
    """Certify every line of the file. method: a Certify, or how one is written; by default the cascade of SoS-1K.

    Raises LuthierError naming the line that is not of this form. watch: receives progress events.
    """
    way = load("sos.sos1k", **WAY) if method is None else Certify.from_value(method)
    ctx = Context(step="sos1k", watch=watch)
    rows = list(read(path))
    known: dict[str, tuple[Certificate | None, str]] = {}
    found = []
    for number, text, says, label in ctx.progress(rows, what="polynomials"):
        if text not in known:
            known[text] = _certified(text, way, ctx)
        made, why = known[text]
        found.append(Line(number, label, says, None if made is None else truth(made), why, made))
    return Checked(tuple(found))


def _certified(text: str, way: Certify, ctx: Context) -> tuple[Certificate | None, str]:
    """The certificate and its reason; of what cannot be read the reason alone."""
    if len(text) == CELL:
        return None, f"the polynomial is cut off at {CELL} characters"
    try:
        made = way.certify(text, ctx)
    except LuthierError as fault:
        return None, str(fault)
    return made, made.reason


def read(path: Any) -> Iterator[tuple[int, str, bool, str]]:
    """(number, polynomial, what the label says, label) of every line that is not blank."""
    place = there(path)
    if place is None or not place.is_file():
        raise LuthierError(f"no file {said(str(path), 200)}", where="sos1k")
    if place.stat().st_size > MOST_BYTES:
        raise LuthierError(f"the file has more than {MOST_BYTES} bytes", where=str(place))
    for number, line in enumerate(place.read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield (number, *_row(line, f"{place}:{number}"))


def _row(line: bytes, where: str) -> tuple[str, bool, str]:
    try:
        raw = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        raise LuthierError(f"not UTF-8 at byte {fault.start}", where=where) from None
    except (ValueError, RecursionError) as fault:
        raise LuthierError(
            f"not JSON: {getattr(fault, 'msg', 'nested too deep or a number too long')}", where=where
        ) from None
    if not isinstance(raw, dict):
        raise LuthierError("expected a JSON object", where=where)
    for key, kind in KEYS.items():
        if key not in raw:
            raise LuthierError(f"no key {key!r}", where=where, do=f"a line has {', '.join(KEYS)}")
        if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            raise LuthierError(f"{key} is {said(raw[key])}", where=where)
    if raw["ans"] not in (0, 1):
        raise LuthierError(f"ans is {said(raw['ans'])}", where=where, do="1 says a sum of squares, 0 none")
    return raw["polynomial"], bool(raw["ans"]), raw["label"]
