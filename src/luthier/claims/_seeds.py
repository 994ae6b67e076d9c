"""The seeds of one claim: run one by one, each kept as soon as it is done, and made into a record."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.catalogue import cards, code_hash, find, source_hash
from luthier.checkpoint.atomic import write_file
from luthier.claims import _judge
from luthier.claims._claim import Claim, OutOfReach, file_of
from luthier.kit.context import Context

PACKAGES = ("luthier", "torch", "transformers")


class Seeds:
    """Those of one claim that are run now.

    unseen: other seeds than the claim's own; None runs these.  record: the claim's in the table, whose unseen seeds
    count with the new ones where the code is the same.
    """

    def __init__(
        self, one: Claim, folder: Path, unseen: Sequence[int] | None, record: Mapping[str, Any] | None,
        watch: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:  # fmt: skip
        self.one, self.watch, self.path, self.source = one, watch, folder / "verdicts.partial.json", source(one.id)
        self.own, kept = unseen is None, self._all().get(one.id, {})
        same = kept.get("source") == self.source and "took" in kept
        self.seen: dict[int, Any] = {int(k): v for k, v in kept["seen"].items()} if same else {}
        self.took: dict[int, float] = {int(k): v for k, v in kept["took"].items()} if same else {}
        self.asked = list(range(one.seeds) if unseen is None else unseen)
        self.earlier = {} if unseen is None else unseen_of(record, self.source)

    def waiting(self) -> list[int]:
        return [n for n in self.asked if n not in self.seen]

    def run(self, until: float, expected: float) -> dict[str, Any] | None:
        """The record, not yet judged; None if the next seed would end after `until` (expected: its seconds)."""
        reason = ""
        with tempfile.TemporaryDirectory(prefix="luthier-claim-") as temp:
            ctx = Context(step=f"claim.{self.one.id}", cache=Path(temp), watch=self.watch)
            try:
                for seed in self.waiting():
                    began = time.monotonic()
                    if began + expected > until:
                        return None
                    self.seen[seed] = dict(self.one.run(seed, ctx.with_(seed=seed)))
                    expected = self.took[seed] = time.monotonic() - began
                    self._keep()
            except OutOfReach as far:
                reason = str(far) or "out of reach here"
        return self._record(reason)

    def _mine(self) -> list[int]:
        """Seeds of this record: the claim's own, or the unseen ones asked for now and kept from before."""
        mine = {n for n in self.seen if (n < self.one.seeds) == self.own}
        return sorted({*self.asked, *mine, *(int(n) for n in self.earlier.get("observations", {}))})

    def _record(self, reason: str) -> dict[str, Any]:
        one, numbers = self.one, self._mine()
        before = {int(k): v for k, v in self.earlier.get("observations", {}).items()}
        every = {**before, **self.seen}
        observations = {n: every[n] for n in numbers if n in every}
        minutes = self.earlier.get("minutes", 0.0) + sum(self.took.get(n, 0.0) for n in numbers) / 60
        return {
            "id": one.id, "sentence": one.sentence, "control": one.control, "relation": one.relation,
            "effect": one.effect, "unit": one.unit, "needed": one.seeds, "seeds": numbers, "reason": reason,
            "contrasts": [] if reason else _judge.contrasts(one, list(observations.values())),
            "also": [] if reason else _judge.also(list(observations.values())),
            "observations": observations, "cost": cost(observations.values()), "minutes": round(minutes, 3),
            "source": self.source, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        }  # fmt: skip

    def done(self) -> None:
        """Forget the kept seeds of a record that stands in the table; others of the claim stay."""
        for seed in self._mine():
            self.seen.pop(seed, None)
            self.took.pop(seed, None)
        self._keep()

    def _all(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def _keep(self) -> None:
        entry = {self.one.id: {"source": self.source, "seen": self.seen, "took": self.took}} if self.seen else {}
        every = {k: v for k, v in self._all().items() if k != self.one.id} | entry
        if every:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(every))
        else:
            self.path.unlink(missing_ok=True)


def unseen_of(record: Mapping[str, Any] | None, of: str) -> Mapping[str, Any]:
    """What the record says of unseen seeds with the source `of`, if anything."""
    found = (record or {}).get("unseen", {})
    return found if found.get("source") == of else {}


def source(id_: str) -> str:
    """Hash of what a verdict rests on: the method's code and the claim's."""
    known = (id_, *getattr(find(id_), "makes", ())) if id_ in cards() else ()
    method = " ".join(source_hash(one) for one in known)
    return hashlib.sha256(f"{method} {code_hash(file_of(id_))}".encode()).hexdigest()[:16]


def cost(observations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of every `cost/` entry its mean over the seeds."""
    values: dict[str, list[float]] = {}
    for seen in observations:
        for key, value in seen.items():
            if key.startswith("cost/"):
                values.setdefault(key.removeprefix("cost/"), []).append(float(value))
    return {key: statistics.fmean(found) for key, found in values.items()}
