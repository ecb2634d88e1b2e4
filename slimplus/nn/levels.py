"""The levels of fake-quantized weights and their gradients, as plain functions of tensors.

Compiled or not, the levels are equal to the bit; gradients are sums whose order may differ.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def rounded_to_grid(position: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest of the integers `0 … largest`, and the mask of positions between the ends of the grid."""
    rounded = position.round()
    integers = rounded.clamp(min=0)
    torch.minimum(integers, largest, out=integers)
    return integers, rounded == integers


class _NearestLevel(torch.autograd.Function):
    """The nearest levels, in one function: half the passes over memory that a chain of operators takes."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, largest: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        steps, inside = rounded_to_grid(position, largest)
        steps -= zero_point
        ctx.save_for_backward(steps, inside, scale)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        steps, inside, scale = ctx.saved_tensors
        (gradient,) = gradients
        of_scale = (gradient * steps).sum(-1, keepdim=True)
        of_steps = gradient * scale
        of_zero_point = -of_steps.sum(-1, keepdim=True)
        return of_steps.mul_(inside), None, of_scale, of_zero_point


class _FrozenLevel(torch.autograd.Function):
    """The levels `(integers - zero_point) * scale`, which keeps nothing of the weight's size for its gradients."""

    @staticmethod
    def forward(ctx: Any, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ctx.save_for_backward(integers, scale, zero_point)
        return (integers - zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None]:
        integers, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        # The difference is summed, not the two sums subtracted: each of them is much larger than their difference.
        of_scale = (integers - zero_point).mul_(gradient).sum(-1, keepdim=True)
        of_zero_point = -(gradient * scale).sum(-1, keepdim=True) if ctx.needs_input_grad[2] else None
        return None, of_scale, of_zero_point


def nearest_level(position: Tensor, largest: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the levels nearest to positions on the grid, `[out, groups, group_size]`, differentiable.

    Args:
        position: positions in steps from level 0, `[out, groups, group_size]`. Those between the ends of the grid get
            the gradient of the levels times the scale; those beyond get none.
        largest: largest integer of each group, `[groups, 1]`.
        scale: `[out, groups, 1]`.
        zero_point: `[out, groups, 1]`.
    """
    return cast(Tensor, _NearestLevel.apply(position, largest, scale, zero_point))


def frozen_levels(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the levels of integers `[out, groups, group_size]`, differentiable in the grid.

    Args:
        integers: the integers, as floats.
        scale: `[out, groups, 1]`.
        zero_point: `[out, groups, 1]`.
    """
    return cast(Tensor, _FrozenLevel.apply(integers, scale, zero_point))


def offset_position(position: Tensor, change: Tensor, factors: Tensor | None) -> Tensor:
    """Return calibrated positions plus trained offsets, in steps; `factors`, `[groups, 1]`, multiply the offsets."""
    return position + (change if factors is None else change * factors)


def offset_levels(
    position: Tensor, change: Tensor, factors: Tensor | None, largest: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Return the levels nearest to `offset_position`; the other arguments are those of `nearest_level`."""
    return nearest_level(offset_position(position, change, factors), largest, scale, zero_point)


def weight_position(start: Tensor, change: Tensor, factors: Tensor | None, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the positions of trained weights on the grid, in steps; `factors`, `[groups, 1]`, multiply the changes."""
    return (start + (change if factors is None else change * factors)) / scale + zero_point


def weight_levels(
    start: Tensor, change: Tensor, factors: Tensor | None, largest: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Return the levels nearest to `weight_position`; the other arguments are those of `nearest_level`."""
    return nearest_level(weight_position(start, change, factors, scale, zero_point), largest, scale, zero_point)
