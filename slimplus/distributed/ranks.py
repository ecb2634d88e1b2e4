"""The processes of a job between the fits: sums and hand-outs of tensors, and who does what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; one process needs no process group.

    All methods but `owners` are collective: every rank calls them in the same order.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
    """

    rank: int = 0
    count: int = 1

    def windows(self, total: int) -> int:
        """How many of the job's first `total` windows are this rank's: it holds windows `rank`, `rank + count`, …"""
        return len(range(self.rank, total, self.count))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each; in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_on(self, owner: int, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on `owner`; what the others hold afterwards is of no use. In place."""
        if self.count > 1:
            torch.distributed.reduce(tensor, dst=owner)
        return tensor

    def send(self, owner: int, tensor: Tensor) -> Tensor:
        """The tensor of `owner`, on each rank; in place, so the others give one of the same shape and dtype."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, src=owner)
        return tensor

    def owners(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Who does each of the works of `costs`: the most costly first, each to the rank with the least so far."""
        loads = [0] * self.count
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return owners
