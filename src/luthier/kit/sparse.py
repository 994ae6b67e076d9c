"""Training a few entries of large matrices: compact leaves, compact state, no dense gradient kept.

K: entries selected in a parameter.  M, N: rows and columns of a matrix.

Each selected parameter stays in the model as it is. Its K chosen entries live in an fp32 leaf of
shape (K,), the only thing an optimizer sees. During backward a hook gathers the K gradients and frees
the dense one at once, so at most one dense gradient exists at a time; after the optimizer step the
leaf is written back. What is kept per entry: index (4 bytes), leaf (4), and the value before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.flows import Remap
from luthier.kit.top import top_indices
from luthier.shapes import Tuned

Choose = Callable[[str, Tensor, int], Tensor]
"""(name, weight, step) -> ascending flat indices of the entries to train from now on"""
Pack = Callable[[Mapping[str, tuple[Tensor, Tensor, Tensor]]], Any]
"""{name: (flat indices, values before, values now)} -> a Delta"""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def matching(
    model: nn.Module, targets: Sequence[str], roles: Mapping[str, Sequence[str]], axes: int = 2
) -> dict[str, nn.Parameter]:
    """The floating-point parameters of at least `axes` axes that `targets` name, in the model's order.

    A target is a glob of parameter names or of roles, or the word `linear`: every matrix inside the
    blocks, so no embeddings, head, norms or biases. More than two axes mean a stack of matrices.
    Raises LuthierError when a target matches nothing.
    """
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    there = {n: p for n, p in model.named_parameters() if p.dim() >= axes and p.is_floating_point()}
    found: set[str] = set()
    for target in targets:
        if target == "linear":
            hits = {n for n, p in there.items() if p.dim() >= 2 and id(p) not in outside}
        else:
            hits = {n for n in there if any(fnmatchcase(word, target) for word in (n, *roles.get(n, ())))}
        if not hits:
            known = sorted({role for words in roles.values() for role in words} - {"other"})
            do = f"write linear, a glob of names, or a role: {', '.join(known)}"
            raise LuthierError(f"the target {target!r} matches nothing that this method can train", do=do)
        found |= hits
    return {n: p for n, p in there.items() if n in found}


def budget(shape: Sequence[int], share: float | None, lora_rank: int | None) -> int:
    """Entries to select in a matrix: as many as LoRA of that rank trains, else a share of all (None: 0.05)."""
    rows, columns = shape
    if lora_rank is not None:
        return min((rows + columns) * lora_rank, rows * columns)
    return max(1, round((0.05 if share is None else share) * rows * columns))


def pick(score_MN: Tensor, k: int, block: int = 1) -> Tensor:
    """Ascending flat indices of the k entries of largest score, or of about k in block x block squares.

    A square's score is the sum of its entries'; round(k / block²) squares are taken, at least one.
    """
    if block == 1:
        return top_indices(score_MN, k)
    rows, columns = score_MN.shape
    if rows % block or columns % block:
        raise LuthierError(
            f"a {rows} x {columns} matrix does not divide into {block} x {block} squares", do="use block 1"
        )
    squares = score_MN.view(rows // block, block, columns // block, block).sum((1, 3))
    best = top_indices(squares, max(1, round(k / block**2)))
    corner = best // squares.shape[1] * block * columns + best % squares.shape[1] * block
    inside = (torch.arange(block)[:, None] * columns + torch.arange(block)).view(-1).to(corner.device)
    return (corner[:, None] + inside).view(-1).sort().values


def per_matrix(weight: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`choose(i, matrix)` for every matrix of a stack, as ascending flat indices into the whole, compact."""
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    size = stack.shape[1] * stack.shape[2]
    parts = [choose(i, matrix).long() + i * size for i, matrix in enumerate(stack)]
    return compact(torch.cat(parts), weight.numel())


def compact(index: Tensor, size: int) -> Tensor:
    """The indices as int32 where a tensor of `size` entries allows it."""
    return index.to(torch.int32 if size < 2**31 else torch.int64)


@dataclass
class _Chosen:
    """The selection in one parameter. touched, before: every entry ever selected, and its first value."""

    weight: nn.Parameter
    index: Tensor
    leaf: Tensor
    touched: Tensor
    before: Tensor

    @property
    def flat(self) -> Tensor:
        return self.weight.data.view(-1)

    def gather(self, weight: Tensor) -> None:
        """The hook: selected gradients are added to the leaf's, the dense gradient goes."""
        grad = weight.grad.reshape(-1).index_select(0, self.index).float()  # type: ignore[union-attr]
        weight.grad = None
        self.leaf.grad = grad if self.leaf.grad is None else self.leaf.grad.add_(grad)

    def write(self) -> None:
        self.flat[self.index] = self.leaf.detach().to(self.flat.dtype)

    def move(self, index: Tensor) -> Tensor:
        """Select `index` from now on; the source of each entry in the old leaf, -1 for a new one."""
        place = torch.searchsorted(self.index, index).clamp_(max=self.index.numel() - 1)
        kept = self.index[place] == index
        value = torch.where(kept, self.leaf.detach()[place], self.flat[index].float())
        self._touch(index[~kept])
        self.index = index
        self.leaf.data.copy_(value)
        return torch.where(kept, place, -1)

    def _touch(self, index: Tensor) -> None:
        place = torch.searchsorted(self.touched, index).clamp_(max=self.touched.numel() - 1)
        fresh = index[self.touched[place] != index]
        if fresh.numel():
            order = torch.cat([self.touched, fresh]).sort()
            self.before = torch.cat([self.before, self.flat[fresh]])[order.indices]
            self.touched = order.values


class Selected(Tuned):
    """A model in which only chosen entries of some parameters train.

    weights: the parameters by name.  first: their selections, ascending flat indices, whose number
    stays the same.  choose: gives a new selection each `every` steps (None: never).  per_entry: an
    optimizer counts steps for each entry.  memory: tensors that `choose` keeps between calls.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        first: Mapping[str, Tensor],
        pack: Pack,
        choose: Choose,
        every: int | None = None,
        per_entry: bool = False,
        memory: dict[str, Tensor] | None = None,
    ):
        self.model, self.choose, self.every, self.per_entry = model, choose, every, per_entry
        self.memory, self._pack = {} if memory is None else memory, pack
        self._required = {p: p.requires_grad for p in model.parameters()}
        for p in model.parameters():
            p.requires_grad_(False)
        self._chosen = {name: self._start(weight, first[name]) for name, weight in weights.items()}
        self._hooks = [c.weight.register_post_accumulate_grad_hook(c.gather) for c in self._chosen.values()]

    @staticmethod
    def _start(weight: nn.Parameter, index: Tensor) -> _Chosen:
        weight.requires_grad_(True)
        index = compact(index, weight.numel()).to(weight.device)
        before = weight.data.view(-1)[index]
        return _Chosen(weight, index, before.float().clone().requires_grad_(True), index, before)

    def leaves(self) -> list[Tensor]:
        return [c.leaf for c in self._chosen.values()]

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.leaves(), "per_entry": self.per_entry}]

    def indices(self) -> dict[str, Tensor]:
        """The selection of each parameter: ascending flat indices."""
        return {name: c.index for name, c in self._chosen.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Remap]:
        for c in self._chosen.values():
            c.write()
        if self.every is None or step % self.every:
            return ()
        moves = []
        for name, c in self._chosen.items():
            index = compact(self.choose(name, c.weight.data, step), c.weight.numel())
            moves.append(Remap(c.leaf, c.move(index)))
        return moves

    def delta(self) -> Any:
        """Every entry that differs, bit for bit, from its value at `bind`, as a sparse Delta."""
        changes = {}
        for name, c in self._chosen.items():
            now = c.flat[c.touched]
            before = c.before.to(now.dtype)  # exact: a training in a wider dtype started from these values
            bits = _BITS[now.element_size()]
            moved = now.view(bits) != before.view(bits)
            changes[name] = (c.touched[moved], before[moved], now[moved])
        return self._pack(changes)

    def bake(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for p, required in self._required.items():
            p.requires_grad_(required)
            p.grad = None
        return self.model

    def state(self) -> dict[str, Tensor]:
        found = {f"memory/{key}": value for key, value in self.memory.items()}
        for name, c in self._chosen.items():
            found |= {f"{name}/index": c.index, f"{name}/leaf": c.leaf.detach()}
            if c.touched is not c.index:
                found |= {f"{name}/touched": c.touched, f"{name}/value": c.flat[c.touched]}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.memory.update({k.removeprefix("memory/"): v for k, v in state.items() if k.startswith("memory/")})
        for name, c in self._chosen.items():
            if f"{name}/leaf" not in state or state[f"{name}/leaf"].shape != c.leaf.shape:
                raise LuthierError("the saved selection is not of this model and these fields", where=name)
            c.index = state[f"{name}/index"].to(c.index)
            c.touched = c.index if f"{name}/touched" not in state else state[f"{name}/touched"].to(c.index)
            c.before = c.flat[c.touched]
            c.leaf.data.copy_(state[f"{name}/leaf"])
            if f"{name}/value" in state:
                c.flat[c.touched] = state[f"{name}/value"].to(c.flat)
            c.write()
