"""Fake-quantized linear layers, which learn their grid alone, or the place of each weight on it as well.

All of them start from calibrated integers. Every forward uses scales and zero points as the packed format will hold
them, so that the trained layer and the packed one agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, storable_scale, storable_zero_point
from slimplus.format.planes import pack_grid
from slimplus.nn.levels import (
    frozen_levels,
    offset_levels,
    offset_position,
    rounded_to_grid,
    weight_levels,
    weight_position,
)

LARGEST_OFFSET = 0.5  # in steps of the grid: enough for a weight to take the other one of its two nearest levels


def _straight_through(real: Tensor, stored: Tensor) -> Tensor:
    """Return `stored`, exact to the bit, with the gradient of `real` (straight-through estimator, arXiv 1308.3432)."""
    return stored.detach() + (real - real.detach())


class FakeQuantizedLinear(nn.Module):
    """Mixed-bit linear layer with frozen integers and a learnable grid: SliM-LLM+ (arXiv 2405.14917, section 3.3).

    Both ends of each row's grid in each group are trained, as shifts in steps of the calibrated scale: the lowest level
    lies at `low + low_shift * scale`, the highest at `high + high_shift * scale`. At 1 bit they are the two levels.

    The integers stay as calibrated. The paper rounds again at every step, which undoes the compensation of one column's
    rounding error by the others: from the calibrated start, re-rounding raised the error of SmolLM2's first block by
    14 % in 128 steps; moving the grid alone lowered it by 27 %. Frozen integers also make every gradient exact.

    Args:
        weight: the calibrated weight.
        bias: the bias, `[out]`, frozen, or None.
        width_rates: factor on the learning rates of the groups of each width; 1 for widths without one. It multiplies
            the parameters, which has the same effect for sign descent and for Adam, and scales their bounds as well.

    Attributes:
        bound: largest magnitude that the optimizer should allow the parameters in `per_weight`.
    """

    integers: Tensor
    bits: Tensor
    rates: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor
    bound = math.inf

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, width_rates: Mapping[int, float] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.integers.shape
        self.group_size, self.scale_bits = weight.group_size, weight.scale_bits
        self.integer_zero_points = weight.integer_zero_points
        # Frozen tensors stay out of the state dict: a training checkpoint holds the quantizers alone.
        self._hold(weight)
        self.register_buffer("bits", weight.bits.to(weight.integers.device), persistent=False)
        rates = [(width_rates or {}).get(width, 1.0) for width in weight.bits.tolist()]
        self.register_buffer("rates", weight.scale.new_tensor(rates), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)
        self.low_shift = nn.Parameter(weight.scale.new_zeros(weight.scale.shape))  # contiguous, for DeepSpeed
        self.high_shift = nn.Parameter(weight.scale.new_zeros(weight.scale.shape))

    def _hold(self, weight: QuantizedWeight) -> None:
        """Keep the integers of a weight."""
        self.register_buffer("integers", self.grouped(weight.integers), persistent=False)

    def grouped(self, weight: Tensor) -> Tensor:
        """Reshape values `[out, in]` to `[out, groups, group_size]`, the last group filled up with zeros."""
        return nn.functional.pad(weight, (0, -self.in_features % self.group_size)).unflatten(1, (-1, self.group_size))

    @property
    def grid(self) -> list[nn.Parameter]:
        """The parameters that place the grid, each `[out, groups]`."""
        return [self.low_shift, self.high_shift]

    @property
    def per_weight(self) -> list[nn.Parameter]:
        """The parameters with a value for each weight, each `[out, groups, group_size]`."""
        return []

    def begin(self) -> None:
        """Say that the training begins: what was asked of the layer before was asked of the calibrated weight."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point `[out, groups]` as they will be stored, differentiable in the shifts."""
        steps = (2**self.bits - 1).to(self.scale.dtype)
        low, high = self.low_shift * self.rates, self.high_shift * self.rates
        scale = self.scale * (1 + (high - low) / steps)
        scale = _straight_through(scale, storable_scale(scale, self.scale_bits))
        zero_point = (self.zero_point - low) * self.scale / scale
        stored = storable_zero_point(zero_point, self.bits, self.integer_zero_points)
        return scale, _straight_through(zero_point, stored)

    def levels(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the levels of the weights `[out, groups, group_size]` on the grid of a scale and zero point.

        Args:
            scale: `[out, groups, 1]`.
            zero_point: `[out, groups, 1]`.
        """
        return frozen_levels(self.integers, scale, zero_point)

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the integers of the levels `[out, groups, group_size]`; the arguments are those of `levels`."""
        return self.integers

    def fake_quantized_weight(self) -> Tensor:
        """Return the weight on its grid, float32 `[out, in]`, differentiable in the parameters."""
        scale, zero_point = (values[..., None] for values in self.qparams())
        return self.levels(scale, zero_point).flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by the fake-quantized weight, `[..., out]`."""
        return nn.functional.linear(inputs, self.fake_quantized_weight(), self.bias)

    @torch.no_grad()
    def packed_grid(self) -> dict[str, Tensor]:
        """Return the tensors `scales` and `zeros` of the packed weight."""
        return pack_grid(*self.qparams(), self.bits, self.scale_bits)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """Return the weight to pack, whose levels are exactly those of `fake_quantized_weight`."""
        scale, zero_point = self.qparams()
        integers = self.rounded(scale[..., None], zero_point[..., None]).flatten(1)[:, : self.in_features]
        form = (self.bits, self.group_size, self.scale_bits, self.integer_zero_points)
        return QuantizedWeight(integers.to(torch.uint8), scale, zero_point, *form)


class ScaledLinear(FakeQuantizedLinear):
    """Linear layer that learns its scales alone: integers and zero points stay as calibrated.

    It takes the arguments of `FakeQuantizedLinear`.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.low_shift.requires_grad_(False)

    @property
    def grid(self) -> list[nn.Parameter]:
        """The parameter that sets the scales, `[out, groups]`."""
        return [self.high_shift]

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return the scale, differentiable in the shift, and the calibrated zero point, both `[out, groups]`."""
        steps = (2**self.bits - 1).to(self.scale.dtype)
        scale = self.scale * (1 + self.high_shift * self.rates / steps)
        return _straight_through(scale, storable_scale(scale, self.scale_bits)), self.zero_point


class _RoundingLinear(FakeQuantizedLinear):
    """Base of the layers that round at every step, by a trained `change` of each weight.

    Where remainders are larger than half a step, the weights are the calibrated ones until `begin`.
    """

    largest: Tensor
    position: Tensor
    calibrated: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        width_rates: Mapping[int, float] | None,
        remainder: Tensor,
    ) -> None:
        super().__init__(weight, bias, width_rates)
        self.rated = bool(width_rates)
        self.register_buffer("position", self.integers + self.grouped(remainder), persistent=False)
        leaves_integers = bool((remainder.abs() > LARGEST_OFFSET).any())
        self.register_buffer("calibrated", self.integers if leaves_integers else None, persistent=False)
        del self.integers
        self.register_buffer("largest", (2**self.bits - 1)[:, None].to(self.scale.dtype), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.position))

    @property
    def per_weight(self) -> list[nn.Parameter]:
        return [self.change]

    @property
    def factors(self) -> Tensor | None:
        """Factor on the change of each group's weights, `[groups, 1]`, or None if all are 1."""
        return self.rates[:, None] if self.rated else None

    def begin(self) -> None:
        self.calibrated = None

    def place(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return each weight's position on the grid before it is rounded, in steps from level 0.

        The shapes are those of `levels`.
        """
        raise NotImplementedError

    def nearest(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the levels nearest to `place`; the arguments are those of `levels`."""
        raise NotImplementedError

    def levels(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.calibrated is not None:
            return frozen_levels(self.calibrated, scale, zero_point)
        return self.nearest(scale, zero_point)

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.calibrated is not None:
            return self.calibrated
        return rounded_to_grid(self.place(scale, zero_point), self.largest)[0]


class LearnedRoundingLinear(_RoundingLinear):
    """Linear layer that learns its grid and which of its two nearest levels each weight takes.

    AutoRound (arXiv 2309.05516) trains offsets of this kind. Here each weight's position on the grid is frozen where
    error compensation left it, and its offset is at most half a step if the optimizer keeps to `bound`. The integers
    thus start as calibrated, and moving the grid moves no weight to another level, which it does in AutoRound.

    Args:
        weight: the calibrated weight.
        bias: the bias, `[out]`, frozen, or None.
        width_rates: factor on the learning rates of the groups of each width, as in `FakeQuantizedLinear`.
        remainder: how far each weight lay above its integer before it was rounded, in steps, `[out, in]`; see
            `slimplus.quantization.gptq.RoundedWeight`.
    """

    bound = LARGEST_OFFSET

    def place(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return each weight's calibrated position plus its offset, in steps from level 0."""
        return offset_position(self.position, self.change, self.factors)

    def nearest(self, scale: Tensor, zero_point: Tensor) -> Tensor:  # noqa: D102
        return offset_levels(self.position, self.change, self.factors, self.largest, scale, zero_point)


class ScaledRoundingLinear(ScaledLinear, LearnedRoundingLinear):
    """`LearnedRoundingLinear` whose zero points stay as calibrated, with the same arguments.

    It is for integer zero points: with a weight's position on the grid frozen, a zero point that moves to the next
    integer moves every weight of its group by a whole step.
    """


class TrainedWeightLinear(_RoundingLinear):
    """Linear layer that learns its grid and its weights (block-wise training of EfficientQAT, arXiv 2407.11062).

    Gradients pass the rounding of weights, and of zero points, by the straight-through estimator: when an integer zero
    point moves, weights are rounded anew, and only those at the ends of the grid change their levels. It takes the
    arguments of `LearnedRoundingLinear`; a weight beyond the ends of the grid starts half a step beyond them.
    """

    start: Tensor

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        width_rates: Mapping[int, float] | None,
        remainder: Tensor,
    ) -> None:
        super().__init__(weight, bias, width_rates, remainder)
        start = (self.position - self.zero_point[..., None]) * self.scale[..., None]
        del self.position
        self.register_buffer("start", start, persistent=False)

    def place(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return each trained weight's position on the grid, in steps from level 0."""
        return weight_position(self.start, self.change, self.factors, scale, zero_point)

    def nearest(self, scale: Tensor, zero_point: Tensor) -> Tensor:  # noqa: D102
        return weight_levels(self.start, self.change, self.factors, self.largest, scale, zero_point)
