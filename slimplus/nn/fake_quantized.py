"""A linear layer with frozen integers and a learnable grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimplus.quantization.affine import QuantizedWeight, storable_scale, storable_zero_point


def _straight_through(real: Tensor, stored: Tensor) -> Tensor:
    """Value of `stored`, gradient of `real` (arXiv 1308.3432)."""
    return real + (stored - real).detach()


class FakeQuantizedLinear(nn.Module):
    """Mixed-bit linear layer whose quantizers learn: SliM-LLM+ (arXiv 2405.14917, section 3.3).

    Trained are, per row and group, both ends of the grid, as shifts in steps of the calibrated scale: level `q = 0`
    lies at `low + low_shift * scale`, the largest one at `high + high_shift * scale`. At 1 bit they are the two levels.

    The integers stay as calibration left them. The paper rounds again at every step, which undoes the compensation of
    one column's rounding error by the others: from the calibrated start, re-rounding raised SmolLM2's first block error
    by 14 % in 128 steps, where moving the grid alone lowered it by 27 %. It also makes every gradient exact.

    Every forward uses the scale and zero point as they will be stored, so that the trained layer and the packed one
    agree bit for bit.

    Args:
        weight: the calibrated weight.
        bias: `[out]` or None, frozen.
    """

    integers: Tensor
    bits: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.integers.shape
        self.group_size = weight.group_size
        padded = nn.functional.pad(weight.integers, (0, -self.in_features % self.group_size))
        # Frozen tensors stay out of the state dict: a training checkpoint holds the quantizers alone.
        self.register_buffer("integers", padded.unflatten(1, (-1, self.group_size)), persistent=False)
        self.register_buffer("bits", weight.bits.to(padded.device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)
        self.low_shift = nn.Parameter(torch.zeros_like(weight.scale))
        self.high_shift = nn.Parameter(torch.zeros_like(weight.scale))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point `[out, groups]` as they will be stored, differentiable in the shifts."""
        steps = (2**self.bits - 1).to(self.scale.dtype)
        scale = self.scale * (1 + (self.high_shift - self.low_shift) / steps)
        scale = _straight_through(scale, storable_scale(scale))
        zero_point = (self.zero_point - self.low_shift) * self.scale / scale
        return scale, _straight_through(zero_point, storable_zero_point(zero_point, self.bits))

    def fake_quantized_weight(self) -> Tensor:
        """`[out, in]`, float32."""
        scale, zero_point = self.qparams()
        levels = (self.integers - zero_point[..., None]) * scale[..., None]
        return levels.flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., out]`."""
        return nn.functional.linear(inputs, self.fake_quantized_weight(), self.bias)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """What is packed: exactly the levels that `fake_quantized_weight` gives."""
        integers = self.integers.flatten(1)[:, : self.in_features]
        return QuantizedWeight(integers, *self.qparams(), self.bits, self.group_size)
