"""Packed layers with random weights, and how far their products are off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, group_count, per_column, storable_scale, storable_zero_point
from slimplus.nn import PackedLinear

TOLERANCE = 1e-2  # of the norm: bfloat16 has 8 bits, and rounds the weights' scales, the inputs and the outputs


def random_weight(
    out_features: int, in_features: int, group_size: int, widths: tuple[int, ...], seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    bits = torch.tensor(widths, dtype=torch.int32)[torch.randint(len(widths), (groups,), generator=generator)]
    levels = per_column(2**bits, group_size, in_features)
    integers = (torch.rand(out_features, in_features, generator=generator) * levels).to(torch.uint8)
    scale = storable_scale(torch.rand(out_features, groups, generator=generator) * 0.1 + 0.01)
    zero_point = storable_zero_point(torch.rand(out_features, groups, generator=generator) * 2**bits, bits)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size)


class Attention(nn.Module):
    """Three layers of other sizes and widths on one input, one of them with a bias, and one on another input."""

    q_proj: PackedLinear
    k_proj: PackedLinear
    v_proj: PackedLinear
    o_proj: PackedLinear

    def __init__(self, group_size: int = 64, in_features: int = 200) -> None:
        super().__init__()
        rows = {"q_proj": 48, "k_proj": 20, "v_proj": 16, "o_proj": 37}
        for seed, (name, out_features) in enumerate(rows.items()):
            weight = random_weight(out_features, in_features, group_size, (1, 2, 3), seed)
            bias = (
                torch.randn(out_features, generator=torch.Generator().manual_seed(seed)) if name == "k_proj" else None
            )
            self.add_module(name, PackedLinear.from_quantized(weight, bias))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)


def inputs_of(rows: int, columns: int = 200, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(9)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
