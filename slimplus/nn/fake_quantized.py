"""A linear layer whose frozen weight passes through learnable group-wise quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimplus.quantization.affine import (
    fake_quantize,
    group_count,
    quantize,
    storable_scale,
    storable_zero_point,
)
from slimplus.quantization.gptq import QuantizedWeight


def _straight_through(real: Tensor, stored: Tensor) -> Tensor:
    """Value of `stored`, gradient of `real`."""
    return real + (stored - real).detach()


class FakeQuantizedLinear(nn.Module):
    """Mixed-bit fake-quantized linear layer: SliM-LLM+'s learnable quantizer (arXiv 2405.14917, section 3.3).

    Trained are, per row and group, the two ends of the grid, as factors of the calibrated ones: level `q = 0` lies at
    `low * low_factor` and the largest level at `high * high_factor`. The paper learns the same two numbers as sigmoids
    over the min-max range; starting from the salience-weighted calibration instead keeps what it found, at 1 bit the
    mean of the group included. Every forward uses the scale and zero point as they will be stored, so that the trained
    layer and the packed one agree bit for bit.

    Args:
        weight: the calibrated weight; `weight.target` is what is rounded, frozen.
        bias: `[out]` or None, frozen.
        group_size: columns a group.
    """

    weight: Tensor
    bits: Tensor
    bias: Tensor | None
    low: Tensor
    high: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, group_size: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.target.shape
        self.group_size = group_size
        groups = group_count(self.in_features, group_size)
        padded = nn.functional.pad(weight.target, (0, groups * group_size - self.in_features))
        # Frozen tensors stay out of the state dict: a training checkpoint holds the quantizers alone.
        self.register_buffer("weight", padded.unflatten(1, (groups, group_size)), persistent=False)
        self.register_buffer("bits", weight.bits.to(padded.device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("low", -weight.zero_point * weight.scale, persistent=False)
        self.register_buffer("high", (self.largest - weight.zero_point) * weight.scale, persistent=False)
        self.low_factor = nn.Parameter(torch.ones_like(weight.scale))
        self.high_factor = nn.Parameter(torch.ones_like(weight.scale))

    @property
    def largest(self) -> Tensor:
        """Largest integer of each group, `[groups]`, float32."""
        return (2**self.bits - 1).float()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point `[out, groups]` as they will be stored, differentiable in the factors."""
        low, high = self.low * self.low_factor, self.high * self.high_factor
        scale = (high - low) / self.largest
        scale = _straight_through(scale, storable_scale(scale))
        zero_point = -low / scale
        return scale, _straight_through(zero_point, storable_zero_point(zero_point, self.bits))

    def fake_quantized_weight(self) -> Tensor:
        """`[out, in]`, float32."""
        scale, zero_point = self.qparams()
        levels = fake_quantize(self.weight, scale[..., None], zero_point[..., None], self.largest[:, None])
        return levels.flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., out]`."""
        return nn.functional.linear(inputs, self.fake_quantized_weight(), self.bias)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """What is packed: exactly the levels that `fake_quantized_weight` gives."""
        scale, zero_point = self.qparams()
        target = self.weight.flatten(1)[:, : self.in_features]
        integers = quantize(target, scale, zero_point, self.bits, self.group_size)
        return QuantizedWeight(integers, scale, zero_point, self.bits, target)
