"""Which rows a step trains on: a pure function of (seed, step), of no generator's state and no process count.

A run is one long line of positions, `sequences` to a step. Several data take turns: each block of as
many positions as there are data holds one item of each, in a keyed order. Each data set is gone
through in keyed permutations, a new one every pass. Processes share a step's positions, so two
processes with half the batch see what one process sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.engine.spec import TrainSpec
from luthier.errors import LuthierError
from luthier.flows import Ctx, Data
from luthier.kit.encode import Row, collate, encode, pack, pad_id


class Stream(Protocol):
    """What a training is fed with.  items: of one pass, for a length in epochs."""

    items: int

    def stream(self, start: int) -> Generator[list[dict[str, Tensor]], None, None]:
        """Micro-batches, of equal keys and with an `attention_mask` each, of the steps from `start` on, without end."""
        ...


class Feed:
    """Micro-batches for each step of one process (`rank` of `world`).

    LuthierError when a data set has nothing to train on.
    """

    def __init__(self, data: Sequence[Data], tokenizer: Any, spec: TrainSpec, ctx: Ctx, rank: int = 0, world: int = 1):
        self.tokenizer, self.spec, self.ctx, self.rank, self.world = tokenizer, spec, ctx, rank, world
        self.names = [d.name for d in data]
        self.sources: list[Sequence[Any]] = [self._source(d) for d in data]
        self.items = sum(len(s) for s in self.sources)
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def _source(self, data: Data) -> Sequence[Any]:
        if not len(data.train):
            raise LuthierError("no training items", where=f"data {data.name}", do="give its split a train part")
        if self.spec.pack and data.train[0].text is not None:
            return pack(data.train, self.tokenizer, self.spec.max_length)
        return data.train

    def place(self, position: int) -> tuple[int, int]:
        """Data set and item at a position of the line."""
        block, turn = divmod(position, len(self.sources))
        order = torch.randperm(len(self.sources), generator=self.ctx.rng("turns", block))
        which = int(order[turn])
        lap, index = divmod(block, len(self.sources[which]))
        return which, int(self._order(which, lap)[index])

    def _order(self, which: int, lap: int) -> Tensor:
        kept = self._orders.get(which)
        if kept is None or kept[0] != lap:
            rng = self.ctx.rng("order", which, self.names[which], lap)
            kept = (lap, torch.randperm(len(self.sources[which]), generator=rng))
            self._orders[which] = kept
        return kept[1]

    def row(self, position: int) -> Row:
        which, index = self.place(position)
        item = self.sources[which][index]
        return item if isinstance(item, Row) else encode(item, self.tokenizer, self.spec.max_length)

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """This process's micro-batches of a step (from 0), on the CPU."""
        size = self.spec.batch
        begin = step * self.spec.sequences(self.world) + self.rank * size
        starts = [begin + turn * size * self.world for turn in range(self.spec.accumulate)]
        pad = pad_id(self.tokenizer)
        return [collate([self.row(at + i) for i in range(size)], pad) for at in starts]

    def stream(self, start: int) -> Generator[list[dict[str, Tensor]], None, None]:
        """The steps from `start` on, without end, readied ahead if the spec gives workers."""
        if not self.spec.workers:
            yield from (self.batches(step) for step in count(start))
        with ThreadPoolExecutor(self.spec.workers) as pool:
            ahead = deque(pool.submit(self.batches, start + i) for i in range(self.spec.workers))
            for step in count(start + self.spec.workers):
                ready = ahead.popleft()
                ahead.append(pool.submit(self.batches, step))
                yield ready.result()
