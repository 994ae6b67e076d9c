"""Toy decoding: greedy or sampled, without a cache.

Paper: none (made for the tests).

B: rows, T: positions, V: words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from torch import nn

from luthier.fields import Count, Range
from luthier.flows import Ctx, Trace
from luthier.shapes import Decode, Decoding, Reduces


class Toy(Decode):
    temperature: Annotated[float, Range(0.0)] = 0.0
    """0 is greedy"""
    max_new_tokens: Count = 8
    """most tokens a row gets"""

    reduces_to = Reduces({"temperature": 0.0}, "transformers.greedy")

    def steps(self, models: Sequence[tuple[nn.Module, Any]], prompts: Sequence[Any], ctx: Ctx) -> Run:
        return Run(self, *models[0], prompts, ctx)


class Run(Decoding):
    def __init__(self, method: Toy, model: nn.Module, tokenizer: Any, prompts: Sequence[Any], ctx: Ctx):
        self.method, self.model, self.tokenizer, self.forwards = method, model, tokenizer, 0
        self.prompts = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
        self.made: list[list[int]] = [[] for _ in prompts]
        self.draws = [ctx.rng("draw", i) for i in range(len(prompts))]

    def __iter__(self) -> Iterator[int]:
        for step in range(self.method.max_new_tokens):
            logits_BV = self._forward()
            for row, made in enumerate(self.made):
                if 1 not in made:
                    made.append(self._choose(logits_BV[row], self.draws[row]))
            yield step
            if all(1 in made for made in self.made):
                return

    def _forward(self) -> torch.Tensor:
        rows = [p + m for p, m in zip(self.prompts, self.made, strict=True)]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[0] * (width - len(r)) + r for r in rows])
        mask_BT = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        self.forwards += 1
        with torch.no_grad():
            return self.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -1]

    def _choose(self, logits_V: torch.Tensor, draw: torch.Generator) -> int:
        if not self.method.temperature:
            return int(logits_V.argmax())
        return int(torch.multinomial((logits_V / self.method.temperature).softmax(-1), 1, generator=draw))

    def trace(self) -> Trace:
        texts = tuple(self.tokenizer.decode(m, skip_special_tokens=True) for m in self.made)
        why = tuple("eos" if 1 in m else "length" for m in self.made)
        return Trace(tuple(map(tuple, self.made)), texts, self.forwards, 0, why)
