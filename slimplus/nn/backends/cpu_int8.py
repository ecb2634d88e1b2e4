"""Products with weights of 1 to 8 bits on a CPU, by PyTorch's weight-only int8 matmul, group by group."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight

COLUMNS = 32  # the columns of a group must be a multiple of this
CENTRE = 128  # the largest centre: q - 128 fits int8 for every q
MAX_ROWS = 64  # rows of input from which dequantizing the weight and multiplying in bfloat16 takes less time


@dataclass(frozen=True)
class Int8Weight:
    """Weights of 1 to 8 bits, one below the other, in the layout of `aten::_weight_int8pack_mm`.

    The operator takes one scale a row, so that each group of columns is a weight of its own.

    Attributes:
        int8: `q - centre` for each integer q, int8 `[groups, rows, group_size]`; the centre is the integer nearest to
            the zero point, as far as the range of int8 allows.
        scales: bfloat16 `[groups, rows]`, for which alone the operator is vectorised.
        offsets: difference between the weights of a row in a group and `int8 * scales`, float32 `[groups, rows]`.
        bias: `[rows]` or None.
    """

    int8: Tensor
    scales: Tensor
    offsets: Tensor
    bias: Tensor | None = None

    @staticmethod
    def supports(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Return whether this is the fastest product for `rows` rows of input and groups of this size."""
        return group_size % COLUMNS == 0 and 0 < rows < MAX_ROWS

    @classmethod
    def from_quantized(cls, weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> Self:
        """Repack weights.

        Args:
            weights: weights with the same columns and the same group size.
            bias: their biases end to end, or None.
        """
        int8, scales, offsets = zip(*(_recentred(weight) for weight in weights), strict=True)
        return cls(torch.cat(int8, dim=1), torch.cat(scales, dim=1), torch.cat(offsets, dim=1), bias)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return self.int8.nbytes + self.scales.nbytes + self.offsets.nbytes

    def linear(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by the weights, `[..., out]`; the result has the inputs' dtype.

        Products are computed in bfloat16 and summed over the groups in float32.
        """
        return int8_linear(inputs, self.int8, self.scales, self.offsets, self.bias)


def _recentred(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors `int8`, `scales` and `offsets` of an `Int8Weight` for one weight."""
    largest = (2**weight.bits - 1).to(torch.float32)
    centre = weight.zero_point.round().clamp(max=CENTRE).maximum(largest - (CENTRE - 1))
    missing = -weight.integers.shape[1] % weight.group_size
    integers = torch.nn.functional.pad(weight.integers, (0, missing)).unflatten(1, (-1, weight.group_size))
    # The subtraction wraps around in uint8; the same bytes read as int8 are the signed differences.
    shifted = integers.transpose(0, 1) - centre.T.to(torch.int16).remainder(256).to(torch.uint8)[..., None]
    offsets = (centre - weight.zero_point) * weight.scale
    return shifted.contiguous().view(torch.int8), weight.scale.T.to(torch.bfloat16), offsets.T


@torch.library.custom_op("slimplus::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(inputs: Tensor, int8: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply `inputs` `[..., in]` by the tensors of an `Int8Weight`; one operator for `torch.compile`."""
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
