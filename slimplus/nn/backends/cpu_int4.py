"""Products with weights of 1 to 4 bits on a CPU, by PyTorch's weight-only int4 matmul."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight, group_count
from slimplus.format.planes import padded_rows

WIDEST = 4
GROUP_SIZES = (256, 128, 64, 32)  # that the operator supports, largest first
CENTRE = 8  # the operator's level for the integer q is (q - 8) * scale + zero
MAX_ROWS = 256  # rows of input from which dequantizing the weight and multiplying in bfloat16 takes less time


@dataclass(frozen=True)
class Int4Weight:
    """Weights of 1 to 4 bits, one below the other, in the layout of `aten::_weight_int4pack_mm_for_cpu`.

    Each weight takes 4 bits, and each row of a group 32 more. Scales and zeros are bfloat16 because the operator is
    vectorised only for bfloat16 (it is forty times slower in float32).

    Attributes:
        int4: the integers, in PyTorch's own order, uint8 `[rows, padded in / 2]`.
        scales_and_zeros: scale and zero of each row in each group, bfloat16 `[groups, rows, 2]`.
        group_size: columns a group.
        out_features: rows of the weights without padding.
        bias: `[out_features]` or None.
    """

    int4: Tensor
    scales_and_zeros: Tensor
    group_size: int
    out_features: int
    bias: Tensor | None = None

    @staticmethod
    def supports(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Return whether this is the fastest product for `rows` rows of input and groups of these widths and size."""
        fits = max(widths) <= WIDEST and group_size % GROUP_SIZES[-1] == 0
        return fits and 0 < rows < MAX_ROWS

    @classmethod
    def from_quantized(cls, weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> Self:
        """Repack weights of 1 to 4 bits.

        Args:
            weights: weights with the same columns and the same group size, a multiple of 32.
            bias: their biases end to end, or None.
        """
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
        """Memory of the tensors, in bytes."""
        return self.int4.nbytes + self.scales_and_zeros.nbytes

    def linear(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by the weights, `[..., out]`, in bfloat16; the result has the inputs' dtype."""
        return int4_linear(inputs, self.int4, self.scales_and_zeros, self.bias, self.group_size, self.out_features)


def _recentre(weight: QuantizedWeight, integers: Tensor) -> Tensor:
    """Write the operator's integers into `integers` `[out, in]` and return its scales and zeros `[out, groups, 2]`.

    The integers are shifted so that the zero point lies within half a step of 8, as far as the range of 4 bits allows.
    The operator's zero is then small: rounding zero and scale to bfloat16 causes an error relative to the level, not
    to its distance from q = 0.
    """
    largest = (2**weight.bits - 1).to(torch.float32)
    nearest = weight.zero_point.round().clamp(max=CENTRE).maximum(largest - (2**WIDEST - 1 - CENTRE))
    shifts = (CENTRE - nearest).T.to(torch.uint8).contiguous()
    columns = weight.integers.T.contiguous()  # as unpacked weights lie in memory
    shifted = torch.empty_like(columns)
    size = weight.group_size
    for source, shift, target in zip(columns.split(size), shifts, shifted.split(size), strict=True):
        torch.add(source, shift, out=target)
    integers[:, : len(columns)] = shifted.T.contiguous()  # casting a transposed view would take four times as long
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
    """Multiply `inputs` `[..., in]` by the tensors of an `Int4Weight`; one operator for `torch.compile`."""
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
