"""Linear layers whose quantizers learn: the grid alone, or what lies on it as well.

All of them start from calibrated integers. Every forward uses scale and zero point as they will be stored, so that the
trained layer and the packed one agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, storable_scale, storable_zero_point

LARGEST_OFFSET = 0.5  # in steps: enough for a weight to take the other one of its two nearest levels


def _straight_through(real: Tensor, stored: Tensor) -> Tensor:
    """Value of `stored`, to the bit, however large `real` is; gradient of `real` (arXiv 1308.3432)."""
    return stored.detach() + (real - real.detach())


def _rounded_to_grid(position: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of the integers `0 … largest`, and which positions lie between the ends of the grid."""
    rounded = position.round()
    integers = rounded.clamp(min=0)
    torch.minimum(integers, largest, out=integers)
    return integers, rounded == integers


class _NearestLevel(torch.autograd.Function):
    """One function for what autograd would do in a chain, in half the passes over memory that such a chain makes."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, largest: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        steps, inside = _rounded_to_grid(position, largest)
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
    """`(integers - zero_point) * scale`, of which nothing the size of the weight is kept for its gradients."""

    @staticmethod
    def forward(ctx: Any, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ctx.save_for_backward(integers, scale, zero_point)
        return (integers - zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None]:
        integers, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        # Not the sum of integers, less that of zero points: each is much larger than their difference.
        of_scale = (integers - zero_point).mul_(gradient).sum(-1, keepdim=True)
        of_zero_point = -(gradient * scale).sum(-1, keepdim=True) if ctx.needs_input_grad[2] else None
        return None, of_scale, of_zero_point


def nearest_level(position: Tensor, largest: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Levels `[out, groups, group_size]` nearest to a `position` of that shape, in steps from level 0.

    Args:
        position: gets the gradient of the levels, times the scale, where it lies between the ends of the grid.
        largest: `[groups, 1]`, the largest integers.
        scale, zero_point: `[out, groups, 1]`.
    """
    return cast(Tensor, _NearestLevel.apply(position, largest, scale, zero_point))


class FakeQuantizedLinear(nn.Module):
    """Mixed-bit linear layer with frozen integers and a learnable grid: SliM-LLM+ (arXiv 2405.14917, section 3.3).

    Trained are, per row and group, both ends of the grid, as shifts in steps of the calibrated scale: level `q = 0`
    lies at `low + low_shift * scale`, the largest one at `high + high_shift * scale`. At 1 bit they are the two levels.

    The integers stay as calibration left them. The paper rounds again at every step, which undoes the compensation of
    one column's rounding error by the others: from the calibrated start, re-rounding raised SmolLM2's first block error
    by 14 % in 128 steps, where moving the grid alone lowered it by 27 %. It also makes every gradient exact.

    Args:
        weight: the calibrated weight.
        bias: `[out]` or None, frozen.
        width_rates: width → factor on the learning rates of its groups; 1 for those not named. It is a factor on the
            parameters, which is the same for a sign step and an Adam; what bounds a parameter is scaled with it.

    Attributes:
        bound: of `per_weight`.
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
        # Frozen tensors stay out of the state dict: a training checkpoint holds the quantizers alone.
        self.register_buffer("integers", self._grouped(weight.integers), persistent=False)
        self.register_buffer("bits", weight.bits.to(weight.integers.device), persistent=False)
        rates = [(width_rates or {}).get(width, 1.0) for width in weight.bits.tolist()]
        self.register_buffer("rates", weight.scale.new_tensor(rates), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)
        self.low_shift = nn.Parameter(weight.scale.new_zeros(weight.scale.shape))  # contiguous, for DeepSpeed
        self.high_shift = nn.Parameter(weight.scale.new_zeros(weight.scale.shape))

    def _grouped(self, weight: Tensor) -> Tensor:
        """`[out, in]` → `[out, groups, group_size]`, the last group filled up with zeros."""
        return nn.functional.pad(weight, (0, -self.in_features % self.group_size)).unflatten(1, (-1, self.group_size))

    @property
    def grid(self) -> list[nn.Parameter]:
        """The parameters that place the grid."""
        return [self.low_shift, self.high_shift]

    @property
    def per_weight(self) -> list[nn.Parameter]:
        """The parameters that each weight has of its own."""
        return []

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point `[out, groups]` as they will be stored, differentiable in the shifts."""
        steps = (2**self.bits - 1).to(self.scale.dtype)
        low, high = self.low_shift * self.rates, self.high_shift * self.rates
        scale = self.scale * (1 + (high - low) / steps)
        scale = _straight_through(scale, storable_scale(scale, self.scale_bits))
        zero_point = (self.zero_point - low) * self.scale / scale
        return scale, _straight_through(zero_point, storable_zero_point(zero_point, self.bits))

    def levels(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """What the weights become, `[out, groups, group_size]`, on the grid of both, `[out, groups, 1]`."""
        return cast(Tensor, _FrozenLevel.apply(self.integers, scale, zero_point))

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers of those levels."""
        return self.integers

    def fake_quantized_weight(self) -> Tensor:
        """`[out, in]`, float32."""
        scale, zero_point = (values[..., None] for values in self.qparams())
        return self.levels(scale, zero_point).flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., out]`."""
        return nn.functional.linear(inputs, self.fake_quantized_weight(), self.bias)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """What is packed: exactly the levels that `fake_quantized_weight` gives."""
        scale, zero_point = self.qparams()
        integers = self.rounded(scale[..., None], zero_point[..., None]).flatten(1)[:, : self.in_features]
        return QuantizedWeight(integers.to(torch.uint8), scale, zero_point, self.bits, self.group_size, self.scale_bits)


class ScaledLinear(FakeQuantizedLinear):
    """Learns the scales alone: integers and zero points stay."""

    @property
    def grid(self) -> list[nn.Parameter]:
        return [self.high_shift]

    def qparams(self) -> tuple[Tensor, Tensor]:
        steps = (2**self.bits - 1).to(self.scale.dtype)
        scale = self.scale * (1 + self.high_shift * self.rates / steps)
        return _straight_through(scale, storable_scale(scale, self.scale_bits)), self.zero_point


class _RoundingLinear(FakeQuantizedLinear):
    """Base of the layers that round at every step; what each weight has of its own is `change`."""

    largest: Tensor
    position: Tensor

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        width_rates: Mapping[int, float] | None,
        remainder: Tensor,
    ) -> None:
        super().__init__(weight, bias, width_rates)
        self.rated = bool(width_rates)
        self.register_buffer("position", self.integers + self._grouped(remainder), persistent=False)
        del self.integers
        self.register_buffer("largest", (2**self.bits - 1)[:, None].to(self.scale.dtype), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.position))

    @property
    def per_weight(self) -> list[nn.Parameter]:
        return [self.change]

    @property
    def scaled_change(self) -> Tensor:
        """`change` at the rates of its groups' widths."""
        return self.change * self.rates[:, None] if self.rated else self.change

    def place(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Where on the grid each weight lies, in steps from level 0, before it is rounded."""
        raise NotImplementedError

    def levels(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return nearest_level(self.place(scale, zero_point), self.largest, scale, zero_point)

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return _rounded_to_grid(self.place(scale, zero_point), self.largest)[0]


class LearnedRoundingLinear(_RoundingLinear):
    """Learns which of its two nearest levels each weight takes, beside the grid (AutoRound, arXiv 2309.05516).

    A weight's place on the grid is frozen where error compensation left it, and an offset is trained, of at most half a
    step where the optimizer keeps `bound`. So the integers start as calibrated, and moving the grid moves no weight to
    another level, as it does in AutoRound.

    Args:
        weight: the calibrated weight.
        bias: `[out]` or None, frozen.
        width_rates: as in `FakeQuantizedLinear`.
        remainder: `[out, in]`, how far above its integer each weight lay, in steps; see `quantize_weight`.
    """

    bound = LARGEST_OFFSET

    def place(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self.position + self.scaled_change


class TrainedWeightLinear(_RoundingLinear):
    """Trains the weights themselves beside the grid, through the straight-through estimator (arXiv 2407.11062).

    Takes what `LearnedRoundingLinear` takes; weights beyond the ends of the grid start half a step beyond.
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
        return (self.start + self.scaled_change) / scale + zero_point
