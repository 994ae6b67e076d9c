"""The processes of a run, started by torchrun (on GPUs also `accelerate launch`): who is who, and sums over all.

Data parallel, and over the leaves of a Tuned only. torch's DistributedDataParallel wants the dense
gradient of every parameter to stand when a backward pass ends; a Tuned that trains selected entries
has freed it by then and kept a compact one, and DDP would sum what is no longer there. So each
process runs its micro-batches alone, then the leaves' gradients are summed once a step, in buckets:
5 % of the traffic when 5 % of the entries are trained.

What has been run: one process, and two gloo processes on a CPU. Not run, for want of the hardware:
CUDA, MPS, NCCL, FSDP2, DeepSpeed. Nothing here assumes a CPU, and the trainer asks only `Ranks` about
its processes: under FSDP2, where leaves are DTensors and arrive reduced, another class with these
methods takes its place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from luthier.errors import LuthierError

BUCKET = 25 << 20
"""bytes of gradients that are summed at once"""


class Ranks:
    """This process among the processes of the run.

    rank, world: its number, from 0, and how many there are.  device: where it computes, which is
    `device` when alone and otherwise the one its launcher gave it.
    """

    def __init__(self, device: torch.device):
        self.rank, self.world = 0, 1
        self.device: torch.device = device
        if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            state = PartialState(cpu=device.type == "cpu")  # starts the process group if nobody has
            self.rank, self.world = state.process_index, state.num_processes
            self.device = torch.device(state.device or device)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes, in fp64."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place; all bring the same shapes in the same order."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for tensor, whole in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(whole.view_as(tensor))

    def share_(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one."""
        if self.world > 1:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.data, 0)

    def first(self, number: int) -> int:
        """The number that the first process has."""
        if self.world == 1:
            return number
        sent = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(sent, 0)
        return int(sent.item())

    def must_agree(self, state: Mapping[str, Tensor], where: str) -> None:
        """LuthierError unless all processes hold the same bytes."""
        if self.world == 1:
            return
        mine = torch.tensor([_digest(state)], dtype=torch.int64, device=self.device)
        every = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        if len({int(t.item()) for t in every}) > 1:
            raise LuthierError(
                "the processes hold different weights", where=where, do="run them on machines of one kind"
            )

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            dist.barrier()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET bytes together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _digest(state: Mapping[str, Tensor]) -> int:
    hashed = hashlib.sha256()
    for name, tensor in state.items():
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(hashed.digest()[:7], "big")
