"""The experiment that claims about masked diffusion share: small decoders learn to solve 4x4 sudoku.

Each grid of the 288, with 7 to 10 cells left that admit no other grid; a puzzle whose digits sum to a multiple of
five under fixed weights is for testing, the others for training, so none is in both. A row is the puzzle (16
tokens), a separator and the solution (16), which alone is masked and trained on. All arms of a seed see the same
puzzles in the same order and start from the same weights. Everything runs in fp32 on one thread's budget.
B: puzzles.  C: cells.  G: grids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from luthier.catalogue import load
from luthier.fields import FrozenMap
from luthier.kit.context import Context
from luthier.kit.encode import IGNORE
from luthier.model import build_model

CELLS, BLANK, MASK, SEPARATOR, FIRST = 16, 4, 5, 6, 8
CONFIG: dict[str, Any] = {
    "vocab_size": FIRST + 5 * CELLS, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "initializer_range": 0.08, "mask_token_id": MASK,
    "slots": {"mixer": {"use": "block.attention", "set": {"causal": False}}},
}  # fmt: skip
STEPS, BATCH, RATE, CLUES = 450, 64, 3e-3, (7, 10)
TESTED = 256


@cache
def grids() -> Tensor:
    """All 288 solved grids, (G, C), digits from 0."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(4):
        rows = itertools.permutations(range(4))
        found = [g + row for row, g in itertools.product(rows, found) if all(row[c] not in g[c::4] for c in range(4))]
    boxes = [[8 * i + 2 * j + k for k in (0, 1, 4, 5)] for i in (0, 1) for j in (0, 1)]
    return torch.tensor([g for g in found if all(len({g[c] for c in box}) == 4 for box in boxes)])


def puzzles(count: int, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` puzzles with a single solution and their solutions, (B, C) each."""
    weights_C = torch.arange(3, 3 + CELLS) ** 2
    made: list[tuple[Tensor, Tensor]] = []
    while sum(len(p) for p, _ in made) < count:
        answer_BC = grids()[torch.randint(len(grids()), (2 * count,), generator=generator)]
        clues_B = torch.randint(CLUES[0], CLUES[1] + 1, (2 * count, 1), generator=generator)
        given_BC = torch.rand(2 * count, CELLS, generator=generator).argsort(1).argsort(1) < clues_B
        agrees_BG = ((answer_BC[:, None] == grids()) | ~given_BC[:, None]).all(2)
        puzzle_BC = torch.where(given_BC, answer_BC, BLANK)
        fits_B = (agrees_BG.sum(1) == 1) & (((puzzle_BC * weights_C).sum(1) % 5 == 0) == test)
        made.append((puzzle_BC[fits_B], answer_BC[fits_B]))
    return torch.cat([p for p, _ in made])[:count], torch.cat([a for _, a in made])[:count]


def prompts_of(puzzle_BC: Tensor) -> Tensor:
    """A token for every pair of cell and content, and the separator, (B, C + 1)."""
    told_BC = FIRST + 5 * torch.arange(CELLS) + puzzle_BC
    return torch.cat([told_BC, torch.full((len(puzzle_BC), 1), SEPARATOR)], 1)


def batch_of(puzzle_BC: Tensor, answer_BC: Tensor) -> dict[str, Tensor]:
    ids = torch.cat([prompts_of(puzzle_BC), answer_BC], 1)
    labels = torch.where(torch.arange(ids.shape[1]) > CELLS, ids, IGNORE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(seed: int, **fields: Any) -> nn.Module:
    """A decoder trained by objective.masked_diffusion with these fields; one for all claims of a process."""
    return _trained(seed, FrozenMap(fields))


@cache
def _trained(seed: int, fields: Mapping[str, Any]) -> nn.Module:
    ctx, objective = Context(seed=seed, step="sudoku"), load("objective.masked_diffusion", **fields)
    model = build_model(CONFIG, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        batch = batch_of(*puzzles(BATCH, False, ctx.rng("train", step)))
        loss = objective.loss(model, batch, ctx.with_(seed=ctx.key("noise", step))).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


class Cells:
    """As much of a tokenizer as decoding cells asks for."""

    eos_token_id = mask_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i + 1) for i in ids)


@cache
def held_out(seed: int, count: int = TESTED) -> tuple[Tensor, Tensor]:
    """Test puzzles and their solutions."""
    return puzzles(count, True, Context(seed=seed, step="sudoku").rng("test"))


def solved(model: nn.Module, use: str, seed: int, **fields: Any) -> dict[str, float]:
    """`accuracy`: the share of test puzzles of which every cell is right; `passes`: the mean over puzzles."""
    puzzle_BC, answer_BC = held_out(seed)
    decoding = load(use, **fields).steps([(model, Cells())], prompts_of(puzzle_BC).tolist(), Context(seed=seed))
    passes_B = torch.zeros(len(puzzle_BC))
    for draft in decoding:
        passes_B[list(draft.rows)] += 1
    right_B = (torch.tensor(decoding.trace().tokens) == answer_BC).all(1)
    return {"accuracy": right_B.double().mean().item(), "passes": passes_B.double().mean().item()}


def at_passes(passes: float, curve: list[dict[str, float]]) -> float:
    """The accuracy that a mix of two neighbours on the curve has at this mean number of passes."""
    curve = sorted(curve, key=lambda one: one["passes"])
    if passes <= curve[0]["passes"]:
        return curve[0]["accuracy"]
    for left, right in itertools.pairwise(curve):
        if passes <= right["passes"]:
            share = (passes - left["passes"]) / max(right["passes"] - left["passes"], 1e-9)
            return left["accuracy"] + share * (right["accuracy"] - left["accuracy"])
    return curve[-1]["accuracy"]
