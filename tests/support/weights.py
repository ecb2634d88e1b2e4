"""Random weights for tests of the quantization."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from slimplus.format.affine import (
    SCALE_BITS,
    QuantizedWeight,
    per_column,
    storable_scale,
    storable_zero_point,
)
from slimplus.quantization.salience import HessianAccumulator

GROUP_SIZES = (16, 32, 64, 128)


@st.composite
def quantized_weights(draw: st.DrawFn) -> QuantizedWeight:
    """A random quantized weight of any shape and mix of widths, with scales of either size."""
    group_size = draw(st.sampled_from(GROUP_SIZES))
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 3 * group_size))
    groups = -(-in_features // group_size)
    bits = torch.tensor(draw(st.lists(st.integers(1, 8), min_size=groups, max_size=groups)), dtype=torch.int32)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = per_column(2**bits - 1, group_size, in_features)
    integers = (torch.rand(out_features, in_features, generator=generator) * (largest + 1)).to(torch.uint8)
    scale_bits = draw(st.sampled_from(SCALE_BITS))
    magnitude = 10.0 ** draw(st.integers(-7, 6))
    scale = storable_scale(torch.rand(out_features, groups, generator=generator) * magnitude, scale_bits)
    zero_point = storable_zero_point(torch.rand(out_features, groups, generator=generator) * 2**bits, bits)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits)


def layer_and_hessian(rows: int = 32, columns: int = 160) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    accumulator = HessianAccumulator(columns, torch.device("cpu"))
    accumulator.add(torch.randn(4 * columns, columns, generator=generator) @ mixing)
    return weight, accumulator.hessian
