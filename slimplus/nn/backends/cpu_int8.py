"""Packed weights wider than 4 bits on a CPU: PyTorch's weight-only int8 matmul, once for each group of columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight

COLUMNS = 32  # a group must hold a multiple of these
CENTRE = 128  # of an 8-bit weight, the integer that becomes 0
MAX_ROWS = 64  # from about here on, dequantizing the weight takes less time


@dataclass(frozen=True)
class Int8Weight:
    """Weights of 1 to 8 bits, one above the other. The operator has one scale a row: a group is a weight of its own.

    Attributes:
        int8: int8 `[groups, rows, group_size]`; it holds `q - centre` for the integer q, where the centre is the one
            nearest to the zero point.
        scales: bfloat16 `[groups, rows]`; only with them, and bfloat16 inputs, is the operator vectorised.
        offsets: float32 `[groups, rows]`, what each weight of a group is above `int8 * scales`.
        bias: `[rows]` or None.
    """

    int8: Tensor
    scales: Tensor
    offsets: Tensor
    bias: Tensor | None = None

    @staticmethod
    def supports(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Whether this is the fast way for inputs of so many rows."""
        return group_size % COLUMNS == 0 and 0 < rows < MAX_ROWS

    @classmethod
    def from_quantized(cls, weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> Self:
        """Repack `weights`, which have the same columns and the same group size."""
        int8, scales, offsets = zip(*(_recentred(weight) for weight in weights), strict=True)
        return cls(torch.cat(int8, dim=1), torch.cat(scales, dim=1), torch.cat(offsets, dim=1), bias)

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.int8.nbytes + self.scales.nbytes + self.offsets.nbytes

    def linear(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., rows]`, in their dtype; computed in bfloat16, summed over groups in float32."""
        return int8_linear(inputs, self.int8, self.scales, self.offsets, self.bias)


def _recentred(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """See the attributes of `Int8Weight`."""
    largest = (2**weight.bits - 1).to(torch.float32)
    centre = weight.zero_point.round().clamp(max=CENTRE).maximum(largest - (CENTRE - 1))
    missing = -weight.integers.shape[1] % weight.group_size
    integers = torch.nn.functional.pad(weight.integers, (0, missing)).unflatten(1, (-1, weight.group_size))
    # Unsigned bytes wrap around, which is what signed ones read in them.
    shifted = integers.transpose(0, 1) - centre.T.to(torch.int16).remainder(256).to(torch.uint8)[..., None]
    offsets = (centre - weight.zero_point) * weight.scale
    return shifted.contiguous().view(torch.int8), weight.scale.T.to(torch.bfloat16), offsets.T


@torch.library.custom_op("slimplus::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(inputs: Tensor, int8: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """`inputs` `[..., in]` times the weight of an `Int8Weight`; an operator of its own for `torch.compile`."""
    groups, rows, size = int8.shape
    flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.bfloat16)
    flat = torch.nn.functional.pad(flat, (0, groups * size - flat.shape[1]))
    parts = flat.unflatten(1, (groups, size)).transpose(0, 1).contiguous()
    outputs = parts.sum(dim=-1, dtype=torch.float32).T @ offsets
    for part, weight, scale in zip(parts, int8, scales, strict=True):
        outputs += torch.ops.aten._weight_int8pack_mm(part, weight, scale)
    if bias is not None:
        outputs += bias
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], rows)


@int8_linear.register_fake
def _(inputs: Tensor, int8: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], int8.shape[1])
