"""WIDEN: weigh each column's change by how far its length and its direction moved, compared by rank.

Paper: arXiv 2408.03092.  Made for experts that moved very differently far, such as a chat model and one that was
pretrained on. Of each matrix's columns (an input's weights; a token's row in an embedding) lengths and directions
are compared with the base's, and the differences are ranked within the expert: ranks compare where sizes do not.
An expert's score is the softmax of its rank over the experts, or `calibration` where the rank is above the mean
rank times `above_average_ratio`; its change is weighed by the mean of both scores. Entries of a vector are scored
by the sizes of their changes, without ranks. One pass over all models finds the weights, one a column and expert.

Footguns: the weights do not sum to 1, by intent; with the defaults about half of each expert's changes are added
in full, so experts that agree overshoot. Ranks of columns that barely moved are noise, but move those of others.

R: rows.  C: columns.  E: experts.  K: columns, tokens or entries that have a weight each.  S: models, the base first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from luthier.fields import Schedule
from luthier.flows import Ctx, Piece
from luthier.kit.angles import cosine
from luthier.kit.deltas import changes, one_each
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform


class Widen(Transform):
    above_average_ratio: Schedule = 1.0
    """multiple of the mean rank above which a score is calibrated: a number, a list by depth, or {glob: either}"""
    calibration: Schedule = 1.0
    """the score that ranks above it get"""

    granularity = "row"
    reduces_to = (
        Reduces({}, "identity", given={"experts": 1}, tolerance=1e-6),
        Reduces({"above_average_ratio": -1.0}, "merge.task_arithmetic", tolerance=1e-6),
    )

    departures = (
        "yule-BUAA/MergeLLM 9178ef9: `widen_merging` divides a column of zeros, such as a padded token's row, by its "
        "length of zero and ranks the outcome highest, as if it had turned most; the weights of the others differ from "
        "ours, where it has not turned (tests/golden/test_merge_widen.py::test_released_code_ranks_zeros_highest)",
    )

    def plan(self, inputs: Any) -> Any:
        for field in ("above_average_ratio", "calibration"):
            one_each(field, [getattr(self, field)] * len(inputs.experts), inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> dict[str, Tensor]:
        """The weights of all changes, (E, K), by tensor name."""
        counts = {name: _weighed(info) for name, info in inputs.tensors.items()}
        room_EK = torch.empty(len(inputs.experts), sum(counts.values()))  # what stays, in one block
        found = dict(zip(counts, room_EK.split(list(counts.values()), dim=1), strict=True))
        for name, parts in groupby(inputs.each(_seen), key=lambda part: part[0]):
            info = inputs.tensors[name]
            seen = (part for _, part in parts)  # taken one by one: of a large matrix there are thousands
            whole = _beside(seen, info.shape[0]) if _by_row(info) else functools.reduce(torch.add, seen)
            found[name].copy_(self._weights(whole, info))
        return found

    def _weights(self, seen: Tensor, info: Any) -> Tensor:
        ratio, calibration = (at(s, info.name, info.depth) for s in (self.above_average_ratio, self.calibration))
        if len(info.shape) < 2:
            return _scores(seen, 1, ratio, calibration).float()
        squares_KS, products_KS = seen.unbind(-1)
        lengths_KS = squares_KS.sqrt()
        longer_EK = (lengths_KS[:, 1:] - lengths_KS[:, :1]).abs().T
        turned_EK = (1 - cosine(products_KS[:, 1:], squares_KS[:, 1:], squares_KS[:, :1])).T
        turned_EK = turned_EK.where((lengths_KS[:, 1:] + lengths_KS[:, :1]).T > 0, 0.0)
        scores = [_scores(_ranks(moved_EK), len(lengths_KS), ratio, calibration) for moved_EK in (longer_EK, turned_EK)]
        return ((scores[0] + scores[1]) / 2).float()

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        weights_EK = ctx.survey[tensors.name]
        assert tensors.base is not None  # the engine has refused a missing base before the first piece
        if _by_row(tensors):
            first = tensors.start // tensors.base.shape[1]
            weights_EK = weights_EK[:, first : first + len(tensors.base)].unsqueeze(-1)
        merged_RC = tensors.base.clone()
        for change_RC, weight in zip(changes(tensors), weights_EK.to(merged_RC), strict=True):
            merged_RC.addcmul_(change_RC, weight)
        return merged_RC


def _by_row(tensor: Any) -> bool:
    """Whether a row is what is weighed: an embedding's, whose columns are the inputs of nothing."""
    return tensor.role == "embed" and len(tensor.shape) > 1


def _weighed(info: Any) -> int:
    """How many weights each expert has."""
    if len(info.shape) < 2:
        return info.numel
    return info.shape[0] if _by_row(info) else info.shape[-1]


def _seen(piece: Piece) -> tuple[str, Tensor]:
    """Of a vector the sizes of its changes, (E, K); of a matrix (K, S, 2): the models' squares and products with the
    base."""
    assert piece.base is not None
    if len(piece.shape) < 2:
        return piece.name, torch.stack([c.abs().flatten() for c in changes(piece)]).double().cpu()
    along, base_RC = int(_by_row(piece)), piece.base.double()
    found = []
    for model_RC in (base_RC, *piece.experts):
        wide_RC = model_RC.double()  # one at a time
        found.append(torch.stack([(wide_RC * wide_RC).sum(along), (wide_RC * base_RC).sum(along)], 1))
    return piece.name, torch.stack(found, 1).cpu()


def _beside(parts: Iterator[Tensor], rows: int) -> Tensor:
    """All parts, (rows, S, 2), in one block: thousands of small ones that stay would scatter over the heap."""
    made, at = torch.empty(0), 0
    for part in parts:
        made = made if at else part.new_empty(rows, *part.shape[1:])
        made[at : at + len(part)] = part
        at += len(part)
    return made


def _ranks(moved_EK: Tensor) -> Tensor:
    """The place of each within its expert, from 0, equal ones in order. All are wanted, so this is a sort."""
    return moved_EK.argsort(dim=1, stable=True).argsort(dim=1).double()


def _scores(significance_EK: Tensor, unit: int, ratio: float, calibration: float) -> Tensor:
    """The softmax over experts of `significance / unit`, calibrated where it is above its mean times `ratio`."""
    above_EK = significance_EK > significance_EK.mean(dim=1, keepdim=True) * ratio
    return (significance_EK / unit).softmax(dim=0).masked_fill(above_EK, calibration)
