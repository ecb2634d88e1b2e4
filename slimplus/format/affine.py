"""Group-wise affine quantization of a linear weight, for 1 to 8 bits.

Shapes, everywhere in slimplus: a weight is `[out, in]`; a group is `group_size` consecutive input columns (the last
group may be shorter); `bits` is `[groups]`; `scale` and `zero_point` are `[out, groups]`.

The integer `q` of a weight, `0 <= q < 2**bits`, stands for the level `(q - zero_point) * scale`. The zero point is a
real number on a grid of `2**(bits - 8)`, which the packed format stores in 8-bit fixed point. One formula thus serves
every width: a 1-bit group with the levels `centre ± s` has `scale = 2 s` and `zero_point = 0.5 - centre / (2 s)`.
Where `integer` zero points are asked for, they are among `0 … 2**bits - 1`: 0 is a level of every group, and a group
whose weights all have one sign has a grid from 0 to the farthest of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BITS = 8
HALF = 0.499  # of a step: a little less than half, so that a level plus it rounds to the level
SMALLEST_SCALE = 2.0**-20  # representable in float16 with a few bits of precision left
SCALE_BITS = (8, 16)
LLOYD_ROUNDS = 4  # the scale of normal weights then changes by less than 1 % a round
# An 8-bit scale is a float16 without the lower 5 of its 10 mantissa bits: 32 steps an octave. Its 8 bits reach over 8
# octaves; the exponent at which they begin is stored once for each row.
_DROPPED, _OCTAVE, _OCTAVES = 5, 32, 8
_LARGEST_STEPS = 0x7BFF >> _DROPPED  # of the largest finite float16
LARGEST_EXPONENT = _LARGEST_STEPS // _OCTAVE - (_OCTAVES - 1)


def group_count(in_features: int, group_size: int) -> int:
    """Return the number of groups that hold `in_features` columns."""
    return math.ceil(in_features / group_size)


def per_column(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeat per-group values `[..., groups]` for every column of their group, `[..., in_features]`."""
    return values[..., None].expand(*values.shape, group_size).flatten(-2)[..., :in_features]


def weight_bits(bits: Tensor, group_size: int, out_features: int, in_features: int) -> int:
    """Return the sum of the widths of all the weights of a layer; `bits` is `[groups]`."""
    return out_features * int(per_column(bits, group_size, in_features).sum())


def minmax_qparams(tile: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point `[out]` that span `[min(w, 0), max(w, 0)]` of a tile `[out, columns]`."""
    return range_qparams(*tile_range(tile), bits)


def tile_range(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return `min(w, 0)` and `max(w, 0)` of the rows of a tile `[out, columns]`, each `[out]`."""
    return tile.amin(dim=-1).clamp(max=0), tile.amax(dim=-1).clamp(min=0)


def range_qparams(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points that span ranges from `low` to `high`, of any shape.

    Any scale represents a row of zeros. It gets the smallest one, since 8-bit scales are coded relative to the largest
    scale of the weight's row.
    """
    empty = low == high
    low, high = torch.where(empty, -SMALLEST_SCALE, low), torch.where(empty, SMALLEST_SCALE, high)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def binary_qparams(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point `[out]` of a 1-bit tile `[out, columns]`: levels `mean(w) ± mean|w|`."""
    half_step = tile.abs().mean(dim=-1).clamp(min=SMALLEST_SCALE / 2)
    return 2 * half_step, 0.5 - tile.mean(dim=-1) / (2 * half_step)


def one_sided_qparams(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point `[out]` of a 1-bit tile `[out, columns]` whose zero point is an integer.

    Its levels are 0 and `scale`, or `-scale` and 0. The side is the one that leaves the smaller squared error, and the
    scale a fixed point of Lloyd's algorithm (doi.org/10.1109/TIT.1982.1056489), the mean of the weights nearest to it.
    """
    sides = torch.stack([tile, -tile]).clamp(min=0)
    nearest = sides > 0
    for _ in range(LLOYD_ROUNDS):
        count = nearest.sum(-1)
        scale = (sides * nearest).sum(-1) / count.clamp(min=1)
        nearest = sides > scale[..., None] / 2
    saved, side = (count * scale.square()).max(dim=0, keepdim=True)
    return scale.gather(0, side)[0].clamp(min=SMALLEST_SCALE), side[0].to(tile.dtype)


def tile_qparams(tile: Tensor, bits: int, integer: bool = False) -> tuple[Tensor, Tensor]:
    """Return the round-to-nearest scale and zero point `[out]` of a tile: min-max, or `mean ± mean|w|` at 1 bit.

    With `integer`, the zero point is an integer at 1 bit as well, see `one_sided_qparams`.
    """
    if bits > 1:
        return minmax_qparams(tile, bits)
    return one_sided_qparams(tile) if integer else binary_qparams(tile)


def choose_qparams(weight: Tensor, bits: Tensor, group_size: int, integer: bool = False) -> tuple[Tensor, Tensor]:
    """Return the round-to-nearest scale and zero point `[out, groups]` of a weight `[out, in]`; see `tile_qparams`."""
    pairs = [
        tile_qparams(tile, width, integer)
        for tile, width in zip(weight.split(group_size, dim=1), bits.tolist(), strict=True)
    ]
    return torch.stack([s for s, _ in pairs], dim=1), torch.stack([z for _, z in pairs], dim=1)


def storable_scale(scale: Tensor, scale_bits: int = 16) -> Tensor:
    """Return the nearest scales `[out, groups]` that the packed format can hold, in the dtype of `scale`.

    Scales of 16 bits are positive float16. Scales of 8 bits have 5 bits of mantissa and lie within 8 octaves of the
    largest scale of their row.
    """
    if scale_bits == 8:
        return decode_scales(*encode_scales(scale)).to(scale.dtype)
    return _positive_half(scale).to(scale.dtype)


def encode_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest 8-bit codes `[out, groups]` and the exponents of the rows `[out, 1]`, both uint8."""
    steps = (_positive_half(scale).view(torch.int16).int() + (1 << _DROPPED) // 2) >> _DROPPED
    steps.clamp_(max=_LARGEST_STEPS)
    exponents = (steps.amax(dim=-1, keepdim=True) // _OCTAVE - (_OCTAVES - 1)).clamp_(min=0)
    codes = (steps - _OCTAVE * exponents).clamp_(min=0)
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def decode_scales(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return the float16 scales that 8-bit `codes` and the `exponents` of their rows stand for; both broadcast."""
    return ((codes.int() + _OCTAVE * exponents.int()) << _DROPPED).to(torch.int16).view(torch.float16)


def _positive_half(scale: Tensor) -> Tensor:
    """Round scales to positive, finite float16."""
    return scale.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max).to(torch.float16)


def storable_zero_point(zero_point: Tensor, bits: Tensor, integer: bool = False) -> Tensor:
    """Return the nearest zero points that the packed format can hold: 8-bit fixed point with `8 - bits` fraction bits.

    With `integer`, they are the nearest of the integers `0 … 2**bits - 1`, which every format holds: 0 is then a level.
    `bits` must broadcast against `zero_point`.
    """
    if integer:
        return torch.round(zero_point).clamp(min=0).minimum(torch.exp2(bits.to(zero_point.dtype)) - 1)
    steps = torch.exp2((MAX_BITS - bits).to(zero_point.dtype))
    return torch.round(zero_point * steps).clamp(0, 2**MAX_BITS - 1) / steps


def nearest_integers(
    weight: Tensor, scale: Tensor, zero_point: Tensor, largest: Tensor | int, out: Tensor | None = None
) -> Tensor:
    """Return the integers `0 … largest` whose levels are nearest to `weight`, as floats; all arguments broadcast.

    The whole part of the zero point is added after rounding, so that a weight half-way between two levels goes where
    the reference code (`round(w / scale) + zero`) sends it. A model that was quantized once and is quantized again has
    many such ties.

    Args:
        weight: the weights.
        scale: the scales.
        zero_point: the zero points.
        largest: largest integer of the grid.
        out: tensor of the result's shape that takes it.
    """
    whole = zero_point.floor()
    rounded = torch.div(weight, scale, out=out).add_(zero_point - whole).round_().add_(whole)
    return rounded.clamp_(0, largest) if isinstance(largest, int) else rounded.clamp_(min=0).minimum(largest)


def _grid_of_columns(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scale, the zero point and the largest integer for each column of a weight `[out, in]`."""
    scale, zero_point, largest = (
        per_column(values, group_size, weight.shape[1])
        for values in (scale, zero_point, (2**bits - 1).to(weight.device, weight.dtype))
    )
    return scale, zero_point, largest


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, group_size: int) -> Tensor:
    """Return the integers `[out, in]`, uint8, whose levels are nearest to `weight`."""
    return nearest_integers(weight, *_grid_of_columns(weight, scale, zero_point, bits, group_size)).to(torch.uint8)


def grid_positions(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return where the weights `[out, in]` lie on the grid of their quantized form, in steps from level 0, `[out, in]`.

    Those beyond an end of the grid get a place a little less than half a step beyond it.
    """
    grid = quantized.scale, quantized.zero_point, quantized.bits, quantized.group_size
    scale, zero_point, largest = _grid_of_columns(weight, *grid)
    return torch.minimum((weight / scale + zero_point).clamp(min=-HALF), largest + HALF)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Return the weight `[out, in]` of `integers` `[out, in]`, in the dtype of `scale`.

    The weight is exact in float32 for scales and zero points that the packed format can hold.
    """
    in_features = integers.shape[1]
    if missing := -in_features % group_size:
        integers = torch.nn.functional.pad(integers, (0, missing))
    levels = integers.unflatten(1, (-1, group_size)).to(scale.dtype, copy=True)
    return levels.sub_(zero_point[..., None]).mul_(scale[..., None]).flatten(1)[:, :in_features]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized linear weight.

    Attributes:
        integers: the integer of each weight, `[out, in]`, uint8.
        scale: the scales, `[out, groups]`, as the packed format can hold them.
        zero_point: the zero points, `[out, groups]`, as the packed format can hold them.
        bits: the width of each group, `[groups]`, int32.
        group_size: columns a group.
        scale_bits: bits that a scale takes in the packed format, 8 or 16.
        integer_zero_points: whether zero points are to stay integers, `0 … 2**bits - 1`, in what fits or trains them.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    group_size: int
    scale_bits: int = 16
    integer_zero_points: bool = False

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[out, in]`, exact in float32, rounded once to any other dtype.

        The result lies in memory column by column, as unpacked integers do. The groups share one small buffer for
        their levels: touching fresh memory would cost more than the arithmetic.
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


def lost_to_storage(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return a mask of the scales that the packed format cannot hold as small, or as large, as the weights ask for.

    Such a scale lies at an end of what can be stored, and off what rounding to nearest would choose by more than the
    factor 2, which is beyond what calibration and training change. Groups of zeros need no scale.

    Args:
        weight: the weight that was quantized, `[out, in]`.
        quantized: its packed form.

    Returns:
        `[out, groups]`, bool.
    """
    steps = []
    for group, width in zip(weight.split(quantized.group_size, dim=1), quantized.bits.tolist(), strict=True):
        tile = group.float()
        extent = tile.amax(1).clamp(min=0) - tile.amin(1).clamp(max=0)
        steps.append(2 * tile.abs().mean(1) if width == 1 else extent / (2**width - 1))
    wanted, scale = torch.stack(steps, dim=1), quantized.scale
    ends = torch.tensor([0, torch.finfo(scale.dtype).max], dtype=scale.dtype, device=scale.device)
    smallest, largest = storable_scale(ends[:, None], quantized.scale_bits)[:, 0]
    if quantized.scale_bits == 8:
        codes, exponents = encode_scales(scale)
        smallest = decode_scales(torch.zeros_like(codes), exponents).to(scale.dtype).clamp(min=smallest)
    too_small = (scale <= smallest) & (wanted > 0) & (2 * wanted < scale)
    return too_small | ((scale >= largest) & (wanted > 2 * scale))


def uniform_bits(in_features: int, group_size: int, target_bits: int) -> Tensor:
    """Return the widths of a weight whose groups all have `target_bits`, `[groups]`, int32."""
    return torch.full((group_count(in_features, group_size),), target_bits, dtype=torch.int32)
