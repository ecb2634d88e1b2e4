"""Lookup in a packed embedding: the rows of some tokens, dequantized in one launch.

The layout is that of `slimplus.format.planes`. A program handles some tokens and one group of columns; which width the
group has, it learns from its number, since groups are stored sorted by width.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimplus.kernels.dequantize import PLANES, dequantize_group
from slimplus.kernels.fused import ONES, WIDTHS

TOKENS = 16  # tokens that a program handles


@triton.jit(do_not_specialize=["count", "vocabulary", "stop1", "stop2", "stop3", "stop4", "stop5", "stop6", "stop7"])
def packed_embedding_kernel(
    tokens,
    plane1,
    plane2,
    plane4,
    plane8,
    scales,
    zeros,
    group_index,
    out,
    count,
    vocabulary,
    in_features,
    groups,
    stride,
    ones,
    factor,
    stop1,
    stop2,
    stop3,
    stop4,
    stop5,
    stop6,
    stop7,
    WIDTHS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write one group of columns of the rows of TOKENS tokens; the grid is blocks of tokens, groups."""
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(1)
    token = tl.load(tokens + place, mask=place < count, other=-1)
    inside = (token >= 0) & (token < vocabulary)
    row = tl.where(inside, token, 0).to(tl.int32)
    first_column = tl.load(group_index + group).to(tl.int32) * GROUP_SIZE
    stops = (0, stop1, stop2, stop3, stop4, stop5, stop6, stop7, groups)
    C: tl.constexpr = GROUP_SIZE // 16
    for BITS in tl.static_range(1, 9):
        if WIDTHS >> BITS & 1:
            has_width = (group >= stops[BITS - 1]) & (group < stops[BITS])
            if has_width:
                value = dequantize_group(
                    plane1,
                    plane2,
                    plane4,
                    plane8,
                    (group - _missing(stops, BITS, 1)) * C,
                    (group - _missing(stops, BITS, 2)) * C,
                    (group - _missing(stops, BITS, 4)) * 2 * C,
                    (group - _missing(stops, BITS, 8)) * 4 * C,
                    scales,
                    zeros,
                    group,
                    groups,
                    stride,
                    row,
                    inside,
                    ones,
                    BITS,
                    GROUP_SIZE,
                )
                value = tl.where(inside[:, None], value, float("nan"))  # a row that is not there must not look like one
                value = value.to(out.dtype.element_ty)
                if SCALED:
                    value = (value.to(tl.float32) * factor).to(out.dtype.element_ty)
                column = first_column + tl.arange(0, GROUP_SIZE)
                exists = (place < count)[:, None] & (column < in_features)[None, :]
                tl.store(out + place[:, None].to(tl.int64) * in_features + column[None, :], value, exists)


@triton.jit
def _missing(stops, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Return the number of stored groups narrower than BITS that have no bits in a plane."""
    count = 0
    for WIDTH in tl.static_range(1, BITS):
        if not WIDTH & PLANE:
            count += stops[WIDTH] - stops[WIDTH - 1]
    return count


def packed_embedding(
    tokens: Tensor,
    packed: Mapping[str, Tensor],
    bit_counts: Mapping[int, int],
    vocabulary: int,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> Tensor:
    """Return the rows of tokens, `[tokens, embedding_dim]`; that of a token outside the vocabulary holds NaN.

    Args:
        tokens: `[tokens]`, integers.
        packed: tensors of the packed format by name.
        bit_counts: number of groups of each width.
        vocabulary: rows of the weight.
        embedding_dim: columns of the weight.
        group_size: columns a group, a power of two from 16.
        dtype: dtype of the rows, to which exact values are rounded.
        factor: a factor on the rounded values, whose products are rounded again.
    """
    rows = torch.empty(len(tokens), embedding_dim, dtype=dtype, device=packed["scales"].device)
    groups, stride = packed["zeros"].shape
    *stops, _ = accumulate(bit_counts.get(width, 0) for width in WIDTHS)
    packed_embedding_kernel[triton.cdiv(len(tokens), TOKENS), groups](
        tokens.contiguous(),
        *(packed.get(f"qplane{plane}", packed["group_index"]) for plane in PLANES),  # an absent one is never read
        packed["scales"],
        packed["zeros"],
        packed["group_index"],
        rows,
        len(tokens),
        vocabulary,
        embedding_dim,
        groups,
        stride,
        ONES[torch.float16],
        factor,
        *stops,
        WIDTHS=sum(1 << width for width in bit_counts),
        GROUP_SIZE=group_size,
        SCALED=factor != 1,
        TOKENS=TOKENS,
    )
    return rows
