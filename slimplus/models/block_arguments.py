"""The arguments of a block besides its hidden states, and what it returns besides them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Windows = Sequence[int]
"""Numbers of windows among those that the arguments were captured for."""

BlockCall = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]
"""Function of a block, its hidden states and its other arguments by name, as `call_block` is."""


@dataclass(frozen=True)
class BlockArguments:
    """The keyword arguments of a block's forward besides the hidden states, such as the mask.

    Attributes:
        shared: arguments that are equal for all windows, by name; they broadcast over a batch, since all windows have
            the same length and none is padded.
        by_window: the others by name, a value for each window, on the CPU.
        batched: whether the block takes several windows at once.
    """

    shared: Mapping[str, Any]
    by_window: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    batched: bool = True

    @property
    def batchable(self) -> bool:
        """Whether several windows can run at once: what differs between them are tensors of one window each."""
        if not self.batched:
            return False
        values = [values[0] for values in self.by_window.values() if values]
        return all(isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) for leaf in pytree.tree_leaves(values))

    def select(self, windows: Windows, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments for a batch of windows on a device."""
        chosen = {}
        for name, values in self.by_window.items():
            first, *others = (values[window] for window in windows)
            if others:
                first = pytree.tree_map(lambda *parts: torch.cat(parts), first, *others)
            chosen[name] = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), first)
        return {**self.shared, **chosen}


def call_block(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return a block's output for hidden states and its other arguments by name."""
    output: Tensor = first_output(block(hidden, **arguments))
    return output


def run_block(
    block: nn.Module, hidden: Tensor, arguments: BlockArguments, windows: Windows = (), call: BlockCall = call_block
) -> Tensor:
    """Return a block's output for a batch `[windows, sequence_length, hidden]`, in the same shape.

    Args:
        block: the block.
        hidden: the hidden states that it reads.
        arguments: its other arguments.
        windows: the number of each window of the batch; needed where the arguments differ between windows.
        call: what calls the block.
    """
    if len(hidden) > 1 and not arguments.batchable:
        numbers = windows or range(len(hidden))
        apart = zip(hidden.split(1), numbers, strict=True)
        return torch.cat([run_block(block, one, arguments, [number], call) for one, number in apart])
    chosen = arguments.select(windows, hidden.device) if arguments.by_window else arguments.shared
    return call(block, hidden, chosen)


def first_output(output: Any) -> Any:
    """Return the hidden states among a block's outputs."""
    return output[0] if isinstance(output, tuple | list) else output


def bind(block: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states that a block is called with, and its other arguments by name.

    Args:
        block: the block, whose class's forward gives the names.
        positional: positional arguments of the call.
        keywords: keyword arguments of the call.

    Raises:
        TypeError: if the arguments do not fit the forward, or further ones can be given by position only.
    """
    forward = inspect.signature(type(block).forward)
    bound = dict(forward.bind(block, *positional, **keywords).arguments)
    _, hidden, *_ = parameters = list(forward.parameters.values())
    others: dict[str, Any] = {}
    for parameter in parameters[2:]:
        if parameter.name not in bound:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise TypeError(f"{type(block).__name__}.forward takes any number of arguments by position")
        given = bound[parameter.name]
        others |= given if parameter.kind is parameter.VAR_KEYWORD else {parameter.name: given}
    return bound[hidden.name], others


class ArgumentRecorder:
    """Recorder of the arguments of each block, window after window; equal ones are kept once."""

    def __init__(self) -> None:
        self._blocks: list[tuple[dict[str, Any], dict[str, list[Any]]]] = []
        self._windows = 0
        self._compared: dict[tuple[int, int], tuple[Any, bool]] = {}
        self._moved: dict[int, tuple[Any, Any]] = {}

    def start_window(self) -> None:
        """Begin the next window: objects of the last one may be gone, and their addresses taken by others."""
        self._windows += 1
        self._compared, self._moved = {}, {}

    def add(self, index: int, arguments: dict[str, Any]) -> None:
        """Record the arguments of block `index` for the window that has begun.

        Raises:
            ValueError: if the block is called with other arguments than in the window before.
        """
        if index == len(self._blocks):
            self._blocks.append((arguments, {}))
            return
        first, by_window = self._blocks[index]
        if first.keys() != arguments.keys():
            raise ValueError(f"block {index} gets other arguments in each window")
        for name, value in arguments.items():
            if name in by_window:
                by_window[name].append(self._on_cpu(value))
            elif not self._equal(first[name], value):
                by_window[name] = [self._on_cpu(first[name])] * (self._windows - 1) + [self._on_cpu(value)]

    def arguments(self, batched: bool) -> list[BlockArguments]:
        """Return the arguments of each block; `batched` tells whether blocks take several windows at once."""
        return [
            BlockArguments({name: value for name, value in first.items() if name not in by_window}, by_window, batched)
            for first, by_window in self._blocks
        ]

    def _equal(self, one: Any, other: Any) -> bool:
        """Return whether two values are equal, each pair of objects compared once in a window: blocks share masks."""
        if one is other:
            return True
        key = (id(one), id(other))
        if key not in self._compared:
            self._compared[key] = (other, _equal_trees(one, other))
        return self._compared[key][1]

    def _on_cpu(self, value: Any) -> Any:
        """Return a value with its tensors on the CPU, the same object for the same value."""
        if id(value) not in self._moved:
            moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), value)
            self._moved[id(value)] = (value, moved)
        return self._moved[id(value)][1]


def _equal_trees(one: Any, other: Any) -> bool:
    """Return whether two values are equal, tensor by tensor."""
    leaves, structure = pytree.tree_flatten(one)
    other_leaves, other_structure = pytree.tree_flatten(other)
    return structure == other_structure and all(map(_equal_leaves, leaves, other_leaves))


def _equal_leaves(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other or (isinstance(one, bool | int | float | str) and bool(one == other))


def batches(count: int, size: int) -> Iterator[range]:
    """Yield the numbers of `count` windows in batches of at most `size`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
