"""Which side an item is on, by its hash alone; and answers in wrong places, for the format-only control."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from luthier.flows import Item


def chosen(names: Sequence[str], size: int | float, weight: Callable[[str], int]) -> set[str]:
    """The groups for testing: those whose hash is below the share, or the lowest ones that hold the count."""
    if isinstance(size, float):
        return {name for name in names if unit(name) < size}
    chosen, held = set(), 0
    for name in names:
        if held >= size:
            break
        chosen.add(name)
        held += weight(name)
    return chosen


def unique(items: Iterable[Item], seen: set[str]) -> list[Item]:
    """Items not seen before, in the order of their ids, so that the first n are a fair sample."""
    first: dict[str, Item] = {}
    for item in items:
        if item.id not in seen:
            first.setdefault(item.id, item)
    return [first[id_] for id_ in sorted(first)]


def shuffle_answers(items: Sequence[Item], key: int) -> list[Item]:
    """The items with each other's answers: the same answers in all, none where it belongs if that can be."""
    order = list(range(len(items)))
    rng = random.Random(key)
    rng.shuffle(order)
    answers = [items[i].answer for i in order]
    for i in range(len(items)):
        if answers[i] != items[i].answer:
            continue
        start = rng.randrange(len(items))
        places = (*range(start, len(items)), *range(start))
        fits = (j for j in places if answers[j] != items[i].answer and answers[i] != items[j].answer)
        j = next(islice(fits, 1), i)
        answers[i], answers[j] = answers[j], answers[i]
    return [
        Item(id=item.id, prompt=item.prompt, answer=answer, meta=item.meta)
        for item, answer in zip(items, answers, strict=True)
    ]


def unit(digest: str) -> float:
    return int(digest[:13], 16) / 16**13
