"""`--set step.key=value`: one value of a recipe, changed from the command line."""

from __future__ import annotations

from typing import Any

from luthier import catalogue
from luthier import recipe_check as check
from luthier.errors import LuthierError, unknown
from luthier.recipe_text import Marked, parse

STEP_KEYS = ("use", "set", "train", "objective", "optim", "search", "vary", "dtype")


def assign(marked: Marked, assignment: str) -> None:
    """Put one assignment into the recipe's values. The key may leave out `set` or `train` where it is clear.

    `math.share=0.1`, `math.train.steps=9`, `math.steps=9`, `data.sums.split.test=64`, `seed=3`.
    """
    label = f"--set {assignment}"
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise LuthierError("expected KEY=VALUE", where=label, do="write --set step.key=value")
    value = value_of(text, label)
    path = _path(marked, key.strip().split("."), label)
    place = marked.value
    for part in path[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise LuthierError(f"{part!r} holds no keys", where=label)
    place[path[-1]] = value
    for known in [k for k in marked.lines if k[: len(path)] == path]:
        del marked.lines[known]
    marked.lines[path] = label


def value_of(text: str, label: str) -> Any:
    """The plain value of YAML text given on the command line; `label` stands for it in errors."""
    try:
        return parse(text, label).value
    except LuthierError as fault:
        raise LuthierError(fault.what, where=label, do=fault.do or "quote the value") from None


def _path(marked: Marked, parts: list[str], label: str) -> tuple[str, ...]:
    if not isinstance(marked.value, dict):
        raise LuthierError("the recipe must be a map", where=marked.where())
    steps = marked.value.get("steps") or {}
    head, rest = parts[0], parts[1:]
    if head in ("seed", "luthier"):
        return (head,)
    if head in ("hardware", "data") and rest:
        return tuple(parts)
    if head == "steps" and rest:
        head, rest = rest[0], rest[1:]
    if head not in steps:
        raise unknown("step", head, [*steps, "seed", "hardware", "data"], where=label)
    if not rest:
        raise LuthierError(f"say which key of {head!r}", where=label, do=f"write --set {head}.KEY=VALUE")
    return ("steps", head, *_step_path(steps[head], rest, label))


def _step_path(body: Any, rest: list[str], label: str) -> tuple[str, ...]:
    use = str(body.get("use")) if isinstance(body, dict) else ""
    card = catalogue.known(use)
    if card is None or rest[0] in STEP_KEYS:  # a wrong `use` is reported with its line later
        return tuple(rest)
    if rest[0] in check.roles_of(card):
        return tuple(rest)
    fields = [f.name for f in card.fields]
    tune = card.shape == "Tune"
    training = list(check.train_fields()) if tune else []
    searching = list(check.search_fields()) if card.shape == "Study" else []
    keys = [k for k in STEP_KEYS if (tune or k not in ("train", "objective", "optim")) and (searching or k != "search")]
    name = rest[0]
    if name in fields and name in training:
        raise LuthierError(
            f"{name!r} is both a field and a train key", where=label, do=f"write set.{name} or train.{name}"
        )
    if name in fields:
        return ("set", *rest)
    if name in training or name in searching:
        return ("train" if name in training else "search", *rest)
    raise unknown(f"key of {use}", name, [*fields, *training, *searching, *check.roles_of(card), *keys], where=label)
