"""What the processes of a job share outside of training: sums and copies of tensors, and the division of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the job; a single process needs no process group.

    `sum`, `sum_on`, `send` and `gather` are collective: every rank calls them in the same order.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    def windows(self, total: int) -> int:
        """Return how many of the job's first `total` windows this rank holds: `rank`, `rank + count`, and so on."""
        return len(range(self.rank, total, self.count))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it; every rank gets the sum."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_on(self, owner: int, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it; only `owner` gets the sum, the others get garbage."""
        if self.count > 1:
            torch.distributed.reduce(tensor, dst=owner)
        return tensor

    def send(self, owner: int, tensor: Tensor) -> Tensor:
        """Copy the tensor of `owner` into the tensor of every rank, of equal shape and dtype, and return it."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, src=owner)
        return tensor

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Return the rows of all ranks in order, on every rank: row `i` is of rank `i % count`, as `windows` says.

        Args:
            rows: this rank's rows, `[rows, ...]`, on its device.
            total: number of rows of all ranks.
        """
        gathered = rows.new_empty(total, *rows.shape[1:])
        for owner in range(self.count):
            places = gathered[owner :: self.count]
            places.copy_(self.send(owner, rows.contiguous() if owner == self.rank else torch.empty_like(places)))
        return gathered

    def owners(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Divide pieces of work among the ranks, the most costly first, each to the rank with the least work so far.

        Args:
            costs: name of a piece of work → its cost, in any unit.

        Returns:
            Name of a piece of work → rank that does it, the same on every rank.
        """
        loads = [0] * self.count
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return owners
