"""Numbers by pattern, as adapters keep them: the first regular expression that fits the end of a module's name.

A pattern from a stranger may be made to search for ever. What a search can cost is estimated from its repeats and
choices before it starts; an adapter whose patterns would cost too much is refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from luthier.errors import LuthierError

MOST = 2e9
"""steps that all searches of one adapter may take by estimate: some seconds"""


class Patterns:
    """`alpha_pattern` and its like. where: the file, for errors."""

    def __init__(self, key: str, given: Any, where: str):
        self.where, self.left = f"{where}: {key}", MOST
        if not isinstance(given or {}, Mapping):
            raise LuthierError("should be a map from patterns to numbers", where=self.where)
        self.known: list[tuple[re.Pattern[str], float, Any]] = []
        for text, value in (given or {}).items():
            if not positive(value):
                raise LuthierError("should be numbers above 0", where=self.where)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of letters that may mean more in a later Python
                    self.known.append((re.compile(rf"(.*\.)?({text})$"), value, _cost(text)))
            except (re.error, RecursionError, OverflowError):
                raise LuthierError("a pattern makes no sense", where=self.where) from None

    def value(self, module: str, default: float) -> float:
        """The value of the first pattern that matches the end of the module's name, from a dot on."""
        for pattern, value, (repeats, choices) in self.known:
            self.left -= float(len(module) + 1) ** min(repeats + 1, 20) * choices
            if self.left < 0:
                raise LuthierError("the patterns would take too long to match", where=self.where,
                                   do="write the modules' names out")  # fmt: skip
            if pattern.match(module):
                return value
        return default


def positive(value: Any) -> bool:
    """Whether it is a number above 0 that a scale can be made of."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e9


def _cost(text: str) -> tuple[int, float]:
    """(repeats, choices): a search takes at most about length^(repeats + 1) * choices steps."""
    plain = re.sub(r"\\.", "", text, flags=re.DOTALL)
    if re.search(r"\)[*+?{]", plain):  # a repeat of repeats
        return 20, math.inf
    groups = plain.count("(")
    return len(re.findall(r"[*+?{]", plain.replace("(?:", "("))), float(plain.count("|") + 1) ** min(groups, 20)
