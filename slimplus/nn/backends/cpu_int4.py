"""Packed weights on a CPU: PyTorch's weight-only int4 matmul."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight, group_count
from slimplus.format.planes import padded_rows

WIDEST = 4
GROUP_SIZES = (256, 128, 64, 32)  # those the operator takes, largest first
CENTRE = 8  # the operator's level for the integer q is (q - 8) * scale + zero
MAX_ROWS = 256  # from about here on, dequantizing the weight and multiplying in bfloat16 takes less time


@dataclass(frozen=True)
class Int4Weight:
    """Weights of 1 to 4 bits, one above the other, as `aten::_weight_int4pack_mm_for_cpu` wants them.

    Each weight takes 4 bits, and each row of a group 32 more. Scales and zeros are bfloat16: only with them, and
    bfloat16 inputs, is the operator vectorised (it is forty times slower in float32).

    Attributes:
        int4: opaque, uint8 `[rows, padded in / 2]`.
        scales_and_zeros: bfloat16 `[groups, rows, 2]`.
        group_size: columns a group.
        out_features: rows that are no padding.
        bias: `[out_features]` or None.
    """

    int4: Tensor
    scales_and_zeros: Tensor
    group_size: int
    out_features: int
    bias: Tensor | None = None

    @staticmethod
    def supports(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Whether this is the fast way for inputs of so many rows."""
        fits = max(widths) <= WIDEST and group_size % GROUP_SIZES[-1] == 0
        return fits and 0 < rows < MAX_ROWS

    @classmethod
    def from_quantized(cls, weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> Self:
        """Repack `weights` of 1 to 4 bits, which have the same columns and the same group size, a multiple of 32."""
        widest, out_features = weights[0].group_size, sum(len(weight.integers) for weight in weights)
        in_features = group_count(weights[0].integers.shape[1], widest) * widest
        stacked = torch.zeros(padded_rows(out_features), in_features, dtype=torch.int32)
        scales_and_zeros = torch.zeros(in_features // widest, len(stacked), 2, dtype=torch.bfloat16)
        first = 0
        for weight in weights:
            rows = slice(first, first + len(weight.integers))
            scales_and_zeros[:, rows] = _recentre(weight, stacked[rows]).transpose(0, 1)
            first = rows.stop
        group_size = next(size for size in GROUP_SIZES if widest % size == 0)
        return cls(
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(stacked, 1),
            scales_and_zeros.repeat_interleave(widest // group_size, dim=0),
            group_size,
            out_features,
            bias,
        )

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.int4.nbytes + self.scales_and_zeros.nbytes

    def linear(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., out]`, in their dtype; computed in bfloat16."""
        return int4_linear(inputs, self.int4, self.scales_and_zeros, self.bias, self.group_size, self.out_features)


def _recentre(weight: QuantizedWeight, integers: Tensor) -> Tensor:
    """Write the `integers` `[out, in]` that the operator centres on 8; return its scales and zeros `[out, groups, 2]`.

    The grid moves so that the zero point comes to lie within half a step of 8, which only 4-bit groups may not allow.
    The operator's zero is small then, and its rounding to bfloat16, as that of the scale, is relative to the level and
    not to its distance from q = 0.
    """
    largest = (2**weight.bits - 1).to(torch.float32)
    nearest = weight.zero_point.round().clamp(max=CENTRE).maximum(largest - (2**WIDEST - 1 - CENTRE))
    shifts = (CENTRE - nearest).T.to(torch.uint8).contiguous()
    columns = weight.integers.T.contiguous()  # as unpacked weights lie in memory
    shifted = torch.empty_like(columns)
    size = weight.group_size
    for source, shift, target in zip(columns.split(size), shifts, shifted.split(size), strict=True):
        torch.add(source, shift, out=target)
    integers[:, : len(columns)] = shifted.T.contiguous()  # a cast on the way would take four times as long
    return torch.stack([weight.scale, (nearest - weight.zero_point) * weight.scale], dim=-1)


@torch.library.custom_op("slimplus::int4_linear", mutates_args=(), device_types="cpu")
def int4_linear(
    inputs: Tensor,
    int4: Tensor,
    scales_and_zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    """`inputs` `[..., in]` times the weight of an `Int4Weight`; an operator of its own for `torch.compile`."""
    flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.bfloat16)
    flat = torch.nn.functional.pad(flat, (0, 2 * int4.shape[1] - flat.shape[1])).contiguous()
    outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, int4, group_size, scales_and_zeros)
    outputs = outputs[:, :out_features]
    if bias is not None:
        outputs = outputs + bias
    return outputs.to(inputs.dtype).contiguous().view(*inputs.shape[:-1], out_features)


@int4_linear.register_fake
def _(
    inputs: Tensor,
    int4: Tensor,
    scales_and_zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)
