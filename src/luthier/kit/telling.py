"""Progress events of a context, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Event = Mapping[str, Any]
Watch = Callable[[Event], None]


class Telling:
    """What tells a watcher, if there is one, what is being done. Has `step`, a name, and `watch`."""

    step: str
    watch: Watch | None

    def emit(self, kind: str, **values: Any) -> None:
        if self.watch:
            self.watch({"kind": kind, "step": self.step, **values})

    def progress(self, items: Iterable[Any], total: int | None = None, what: str = "") -> Iterator[Any]:
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        for done, item in enumerate(items):
            self.emit("progress", what=what, done=done, total=total)
            yield item
        self.emit("progress", what=what, done=total, total=total)
