"""One kind of error for everything a user can mend: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONG = 400
"""Letters of a part of an error that are shown: a hostile file may name a tensor by a megabyte."""
FUZZY = 5000
"""Known words among which the nearest is looked for by likeness."""


class LuthierError(Exception):
    """An error the user can act on; the command line prints it as one line and exits with code 2.

    what: the fault, one clause.  where: file, line, tensor or field.  do: the next action.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None):
        self.what, self.where, self.do = what, where, do
        super().__init__(" ".join(str(self).split()))

    def __str__(self) -> str:
        head = f"{_short(self.where)}: {_short(self.what)}" if self.where else _short(self.what)
        return f"{head}; {_short(self.do)}" if self.do else head

    def at(self, where: str) -> LuthierError:
        """The same error, placed: used by whoever knows the file and line the value came from."""
        return LuthierError(self.what, where=f"{where}: {self.where}" if self.where else where, do=self.do)


def said(value: object, most: int = 80) -> str:
    """A value as it was given, cut where it is long: an error is one line that can be read."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _short(text: str) -> str:
    """The text, or its two ends where it is long."""
    return text if len(text) <= LONG else f"{text[: LONG // 2]} ... {text[-LONG // 2 :]}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when nothing is close."""
    known = list(known)
    likely = known if len(known) <= FUZZY and len(word) <= LONG else []
    found = difflib.get_close_matches(word, likely, n=1, cutoff=0.5)
    if not found:  # a last part may be right where the whole is not: "ties" for "merge.ties"
        found = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    return found[0] if found else None


def unknown(kind: str, word: str, known: Iterable[str], where: str | None = None) -> LuthierError:
    """The error for a name nobody knows, with the nearest right one."""
    known = sorted(known)
    near = nearest(str(word), known)
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    do = f"did you mean {near!r}?" if near else f"known: {listed}" if known else None
    return LuthierError(f"unknown {kind} {said(word)}", where=where, do=do)
