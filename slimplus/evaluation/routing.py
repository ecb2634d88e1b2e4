"""The experts that a model sends tokens to, compared with those of the full-precision model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimplus.models.architectures import expert_stacks


class RoutingRecorder(AbstractContextManager["RoutingRecorder"]):
    """Recorder of the experts of each token, within whose context `watch` is called with each block before it runs."""

    def __init__(self) -> None:
        self._chosen: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def watch(self, index: int, block: nn.Module) -> nn.Module:
        """Record what the experts of block `index`, and of copies made of it, are called with; return the block."""
        for name, stack in expert_stacks(block).items():
            seen = self._chosen.setdefault(f"{index}.{name}", [])

            def record(stack: nn.Module, inputs: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
                seen.append(stack.choices(*inputs).int().cpu())  # type: ignore[operator]

            self._handles.append(stack.register_forward_pre_hook(record))
        return block

    def chosen(self) -> dict[str, Tensor]:
        """Return the experts of each token, `[tokens, chosen]`, int32, by the block's number and the experts' name."""
        return {name: torch.cat(parts) for name, parts in self._chosen.items() if parts}


def matches(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many of the expected choices of experts are found, and how many there are.

    Args:
        found: experts of each token, `[tokens, chosen]` in any order, by name.
        expected: those of another model for the same tokens.
    """
    agreeing = total = 0
    for name, choices in expected.items():
        agreeing += int((choices[:, :, None] == found[name][:, None, :]).any(-1).sum())
        total += choices.numel()
    return agreeing, total
