"""Group-wise affine quantization of a linear weight, for 1 to 8 bits.

Shapes, everywhere in `slimplus.quantization`: a weight is `[out, in]`; a group is `group_size` consecutive input
columns (the last may be shorter); `bits` is `[groups]`; `scale` and `zero_point` are `[out, groups]`.

A level is `(q - zero_point) * scale` with `0 <= q < 2**bits`. The zero point is a real number on a grid of
`2**(bits - 8)`, which is what the packed format stores (8-bit fixed point). So one formula serves every width: a
1-bit group with levels `centre ± s` has `scale = 2 s` and `zero_point = 0.5 - centre / (2 s)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BITS = 8
SMALLEST_SCALE = 2.0**-20  # representable in float16 with a few bits of precision left
SCALE_BITS = (8, 16)
# Of an 8-bit scale five bits are the upper ones of a float16's ten of mantissa, three are its exponent above the row's.
_DROPPED, _OCTAVE, _OCTAVES = 5, 32, 8
_LARGEST_STEPS = 0x7BFF >> _DROPPED  # of the largest float16
LARGEST_EXPONENT = _LARGEST_STEPS // _OCTAVE - (_OCTAVES - 1)


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups that hold `in_features` columns."""
    return math.ceil(in_features / group_size)


def per_column(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """Spread per-group values `[..., groups]` over their columns: `[..., in_features]`."""
    return values[..., None].expand(*values.shape, group_size).flatten(-2)[..., :in_features]


def weight_bits(bits: Tensor, group_size: int, out_features: int, in_features: int) -> int:
    """Widths of all weights of a layer, summed; `bits` is `[groups]`."""
    return out_features * int(per_column(bits, group_size, in_features).sum())


def minmax_qparams(tile: Tensor, bits: int, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[out]` that span `shrink * [min(w, 0), max(w, 0)]` of a tile `[out, columns]`.

    A row of zeros, which any scale represents, gets the smallest: it must not be the largest of the whole row.
    """
    low = tile.amin(dim=-1).clamp(max=0) * shrink
    high = tile.amax(dim=-1).clamp(min=0) * shrink
    empty = low == high
    low, high = torch.where(empty, -SMALLEST_SCALE, low), torch.where(empty, SMALLEST_SCALE, high)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def binary_qparams(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[out]` of a 1-bit tile `[out, columns]`: levels `mean(w) ± mean|w|`."""
    half_step = tile.abs().mean(dim=-1).clamp(min=SMALLEST_SCALE)
    return 2 * half_step, 0.5 - tile.mean(dim=-1) / (2 * half_step)


def tile_qparams(tile: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round-to-nearest scale and zero point `[out]` of a tile: min-max, or mean ± mean magnitude at 1 bit."""
    return binary_qparams(tile) if bits == 1 else minmax_qparams(tile, bits)


def choose_qparams(weight: Tensor, bits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round-to-nearest scale and zero point `[out, groups]`, group by group."""
    pairs = [
        tile_qparams(tile, width) for tile, width in zip(weight.split(group_size, dim=1), bits.tolist(), strict=True)
    ]
    return torch.stack([s for s, _ in pairs], dim=1), torch.stack([z for _, z in pairs], dim=1)


def storable_scale(scale: Tensor, scale_bits: int = 16) -> Tensor:
    """The nearest scales `[out, groups]` that the packed format holds, in the dtype given.

    With 16 bits they are positive float16, with 8 those of 5 bits of mantissa within 8 octaves of a row's largest.
    """
    if scale_bits == 8:
        return scales_of(*scale_codes(scale)).to(scale.dtype)
    return _positive_half(scale).to(scale.dtype)


def scale_codes(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The two levels of 8-bit scales: the nearest codes `[out, groups]` and each row's exponent `[out, 1]`, uint8."""
    steps = (_positive_half(scale).view(torch.int16).int() + (1 << _DROPPED) // 2) >> _DROPPED
    steps.clamp_(max=_LARGEST_STEPS)
    exponents = (steps.amax(dim=-1, keepdim=True) // _OCTAVE - (_OCTAVES - 1)).clamp_(min=0)
    codes = (steps - _OCTAVE * exponents).clamp_(min=0)
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def scales_of(codes: Tensor, exponents: Tensor) -> Tensor:
    """The float16 scales of 8-bit `codes` under `exponents`, which broadcast."""
    return ((codes.int() + _OCTAVE * exponents.int()) << _DROPPED).to(torch.int16).view(torch.float16)


def _positive_half(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max).to(torch.float16)


def storable_zero_point(zero_point: Tensor, bits: Tensor) -> Tensor:
    """The nearest zero point the packed format holds: 8-bit fixed point with `8 - bits` fraction bits.

    `bits` must broadcast against `zero_point`.
    """
    steps = torch.exp2((MAX_BITS - bits).to(zero_point.dtype))
    return torch.round(zero_point * steps).clamp(0, 2**MAX_BITS - 1) / steps


def nearest_integers(weight: Tensor, scale: Tensor, zero_point: Tensor, largest: Tensor | int) -> Tensor:
    """Integers `0 … largest` nearest to `weight` on the grid, as floats; all arguments broadcast.

    The whole part of the zero point is added after rounding, so that weights half-way between two levels go where
    the reference (`round(w / scale) + zero`) sends them: checkpoints that were quantized before are full of ties.
    """
    whole = zero_point.floor()
    rounded = torch.round(weight / scale + (zero_point - whole)).add_(whole)
    return rounded.clamp_(0, largest) if isinstance(largest, int) else rounded.clamp_(min=0).minimum(largest)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, group_size: int) -> Tensor:
    """Integers `[out, in]` (uint8) nearest to `weight` on the grid."""
    columns = weight.shape[1]
    scale, zero_point, largest = (
        per_column(t, group_size, columns) for t in (scale, zero_point, (2**bits - 1).to(weight.dtype))
    )
    return nearest_integers(weight, scale, zero_point, largest).to(torch.uint8)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Weight `[out, in]` in the dtype of `scale`; exact in float32 for storable scales and zero points."""
    in_features = integers.shape[1]
    if missing := -in_features % group_size:
        integers = torch.nn.functional.pad(integers, (0, missing))
    levels = integers.unflatten(1, (-1, group_size)).to(scale.dtype, copy=True)
    return levels.sub_(zero_point[..., None]).mul_(scale[..., None]).flatten(1)[:, :in_features]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized linear weight.

    Attributes:
        integers: `[out, in]`, uint8.
        scale: `[out, groups]`, storable.
        zero_point: `[out, groups]`, storable.
        bits: `[groups]`, int32.
        group_size: columns a group.
        scale_bits: 8 or 16, those that a scale takes in the packed format.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    group_size: int
    scale_bits: int = 16

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]`, exact in float32, rounded once to any other dtype.

        It lies in memory column by column, as unpacked integers do, and is made group by group in one small buffer:
        memory that is touched for the first time costs more than the arithmetic.
        """
        columns = self.integers.T
        weight = torch.empty(columns.shape, dtype=dtype, device=columns.device)
        buffer = torch.empty(self.group_size, columns.shape[1], device=columns.device)
        groups = zip(
            columns.split(self.group_size), self.scale.T.contiguous(), self.zero_point.T.contiguous(), strict=True
        )
        for target, (source, scale, zero_point) in zip(weight.split(self.group_size), groups, strict=True):
            level = torch.sub(source, zero_point, out=buffer[: len(source)])
            target.copy_(level.mul_(scale))
        return weight.T


def uniform_bits(in_features: int, group_size: int, target_bits: int) -> Tensor:
    """`[groups]`, all at the target."""
    return torch.full((group_count(in_features, group_size),), target_bits, dtype=torch.int32)
