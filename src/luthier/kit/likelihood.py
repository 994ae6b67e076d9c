"""Likelihoods of rows of tokens.  N: labelled places, D: channels, V: words, B: rows, T: positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.kit.encode import IGNORE, Row, collate
from luthier.kit.logits import labelled

PLACES = 1024
"""Labelled places whose logits exist at once."""


@torch.no_grad()
def summed_nll(model: nn.Module, rows: Sequence[Row], pad: int) -> list[float]:
    """The summed negative log-likelihood of each row's labels, in nats, of one padded batch."""
    batch = on_device(rows, pad, model)
    seen = labelled(model, batch)
    row_N = (batch["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
    nll_N = torch.cat([
        F.cross_entropy(seen.head(h_ND).float(), y_N, reduction="none")
        for h_ND, y_N in zip(seen.h_ND.split(PLACES), seen.y_N.split(PLACES), strict=True)
    ])  # fmt: skip
    return torch.zeros(len(rows), dtype=torch.float64).index_add(0, row_N.cpu(), nll_N.double().cpu()).tolist()


def on_device(rows: Sequence[Row], pad: int, model: nn.Module) -> Mapping[str, Tensor]:
    """`collate`, where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in collate(rows, pad).items()}


def by_length(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Indices of the rows in batches of `size`, rows of like lengths together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    return [order[i : i + size] for i in range(0, len(order), size)]
