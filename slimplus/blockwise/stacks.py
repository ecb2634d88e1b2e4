"""Sums over the inputs of a block's layers, and over those of all experts together, towards which rare ones are shrunk.

The experts of a block may be hundreds, each with a Hessian of its own. `BlockData.chunks` divides the layers, so that
the Hessians of one chunk are in memory at a time; the sum over all experts is the same for every chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from slimplus.blockwise.data import BlockData
from slimplus.distributed.ranks import Ranks


class Mergeable(Protocol):
    """Sums that others of the same kind can be added to."""

    tokens: int

    def merge(self, other: Self) -> None:
        """Add the sums of `other`."""


Sums = TypeVar("Sums", bound=Mergeable)


class StackSums(Generic[Sums]):
    """Sums of some layers of a block, and of the stacks of experts that these layers belong to.

    Args:
        data: the block.
        names: the layers, of which each has its own sums.
        make: function that returns empty sums for a layer.

    Attributes:
        own: layer → its sums.
        shared: name of a stack → the sums of all its experts, once `merge` has been called.
    """

    def __init__(self, data: BlockData, names: Sequence[str], make: Callable[[nn.Linear], Sums]) -> None:
        self._stack = data.stack
        self.own = {name: make(data.layers[name]) for name in names}
        self.shared = {self._stack[name]: make(data.layers[name]) for name in names if name in self._stack}

    def targets(self) -> Mapping[str, Sums]:
        """Return the sums to add a layer's inputs to, by the layer's name, experts outside the chunk included."""
        others = {
            name: self.shared[stack]
            for name, stack in self._stack.items()
            if stack in self.shared and name not in self.own
        }
        return self.own | others

    def merge(self, ranks: Ranks, device: torch.device) -> None:
        """Add the layers' own sums to those of their stacks, and the tokens of all ranks to each other."""
        for name, sums in self.own.items():
            if name in self._stack:
                self.shared[self._stack[name]].merge(sums)
        everything = [*self.own.values(), *self.shared.values()]
        tokens = ranks.sum(torch.tensor([sums.tokens for sums in everything], dtype=torch.int64, device=device))
        for sums, count in zip(everything, tokens.tolist(), strict=True):
            sums.tokens = count

    def shared_by(self, name: str) -> Sums | None:
        """Return the sums of the stack that a layer belongs to, or None for a layer that is no expert's."""
        return self.shared[self._stack[name]] if name in self._stack else None
