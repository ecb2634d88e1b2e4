"""Dequantization of a layer's weight from its packed planes, to 16 bits or float32, whole or slice by slice.

The layout is that of `slimplus.format.planes`. Each bit width gets a launch of its own, so that the width is a constant
of the kernel. A program handles one group of columns and a block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimplus.kernels.fused import ONES
from slimplus.kernels.unpack import as_tile, load_exponents, load_scale, unpack_group

PLANES = (1, 2, 4, 8)
ROWS = 64  # rows of the weight that a program handles
SCRATCH_BYTES = 1 << 25  # of a dequantized slice, which fits the L2 cache of a GPU that serves models


@triton.jit
def dequantize_group(
    plane1,
    plane2,
    plane4,
    plane8,
    first1,
    first2,
    first4,
    first8,
    scales,
    zeros,
    group,
    groups,
    stride,
    row,
    inside,
    ones,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Return the weights of one group in some rows, `[rows, GROUP_SIZE]`, float32.

    `scales` and `zeros` are tensors of the packed format, `group` is the group's place among the `groups` stored there;
    the other arguments are those of `unpack_group`.
    """
    pairs = unpack_group(
        plane1,
        plane2,
        plane4,
        plane8,
        first1,
        first2,
        first4,
        first8,
        stride,
        row,
        inside,
        ones,
        BITS,
        GROUP_SIZE,
        tl.float16,
    )
    exponents = load_exponents(scales, groups, stride, row, inside)
    scale = load_scale(scales, exponents, group, stride, row, inside) * (1 << BITS)
    zero = tl.load(zeros + group * stride + row, mask=inside, other=0).to(tl.float32) * (1 / 256)
    # Only the product is rounded, exactly as level * scale is: its factors differ from these by powers of two.
    return (as_tile(pairs, tl.float16).to(tl.float32) - (1 + zero)[:, None]) * scale[:, None]


_NOT_SPECIALIZED = ["first_group", "first1", "first2", "first4", "first8", "first_row", "out_features", "ones"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _dequantize_kernel(
    plane1,
    plane2,
    plane4,
    plane8,
    scales,
    zeros,
    group_index,
    out,
    first_group,
    first1,
    first2,
    first4,
    first8,
    first_row,
    out_features,
    in_features,
    groups,
    stride,
    ones,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    member = tl.program_id(1)
    group = first_group + member
    local_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first_row + local_row
    inside = row < stride
    CONTAINERS: tl.constexpr = GROUP_SIZE // 16
    weight = dequantize_group(
        plane1,
        plane2,
        plane4,
        plane8,
        first1 + member * CONTAINERS,
        first2 + member * CONTAINERS,
        first4 + member * 2 * CONTAINERS,
        first8 + member * 4 * CONTAINERS,
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
    column = tl.load(group_index + group).to(tl.int32) * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
    exists = (row < out_features)[:, None] & (column < in_features)[None, :]
    place = local_row[:, None].to(tl.int64) * in_features + column[None, :]
    tl.store(out + place, weight.to(out.dtype.element_ty), exists)


def dequantize(
    packed: Mapping[str, Tensor],
    bit_counts: Mapping[int, int],
    out_features: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight `[out, in]` of a packed layer, on the device of its tensors.

    Args:
        packed: tensors of the packed format by name.
        bit_counts: number of groups of each width, known without reading the device's memory.
        out_features: rows of the weight.
        in_features: columns of the weight.
        group_size: columns a group, a power of two from 16.
        dtype: dtype of the result; levels are exact in float32 and rounded once.
    """
    weight = torch.empty(out_features, in_features, dtype=dtype, device=packed["scales"].device)
    _dequantize_rows(packed, bit_counts, group_size, 0, weight)
    return weight


def dequantized_matmul(
    inputs: Tensor,
    packed: Mapping[str, Tensor],
    bit_counts: Mapping[int, int],
    group_size: int,
    outputs: Tensor,
    bias: Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Write `inputs @ weight.T + bias` to `outputs`; of the weight only a slice of rows is dequantized at a time.

    A slice is multiplied while it is still in the cache of the GPU, and all slices lie in the same memory.

    Args:
        inputs: `[tokens, in]`, in the dtype to multiply in.
        packed: tensors of the packed format by name.
        bit_counts: number of groups of each width.
        group_size: columns a group, a power of two from 16.
        outputs: `[tokens, out]` in the dtype of the inputs; it may be some columns of a larger tensor.
        bias: `[out]` in the dtype of the inputs, or None.
        scratch_bytes: largest size of a slice.
    """
    in_features, out_features = inputs.shape[1], outputs.shape[1]
    rows = max(ROWS, scratch_bytes // (in_features * inputs.itemsize) // ROWS * ROWS)
    scratch = inputs.new_empty(min(rows, out_features), in_features)
    for first in range(0, out_features, rows):
        part = slice(first, min(first + rows, out_features))
        weight = scratch[: part.stop - first]
        _dequantize_rows(packed, bit_counts, group_size, first, weight)
        if bias is None:
            torch.mm(inputs, weight.T, out=outputs[:, part])
        else:
            torch.addmm(bias[part], inputs, weight.T, out=outputs[:, part])


def _dequantize_rows(
    packed: Mapping[str, Tensor], bit_counts: Mapping[int, int], group_size: int, first_row: int, weight: Tensor
) -> None:
    """Write the rows from `first_row` on of a packed layer's weight to `weight` `[rows, in]`."""
    rows, in_features = weight.shape
    # An absent plane is never read; any tensor takes its place.
    planes = [packed.get(f"qplane{plane}", packed["group_index"]) for plane in PLANES]
    words = dict.fromkeys(PLANES, 0)
    first_group = 0
    for width in sorted(bit_counts):
        count = bit_counts[width]
        _dequantize_kernel[triton.cdiv(rows, ROWS), count](
            *planes,
            packed["scales"],
            packed["zeros"],
            packed["group_index"],
            weight,
            first_group,
            *(words[plane] for plane in PLANES),
            first_row,
            first_row + rows,
            in_features,
            *packed["zeros"].shape,
            ONES[torch.float16],
            BITS=width,
            GROUP_SIZE=group_size,
            ROWS=ROWS,
        )
        first_group += count
        for plane in PLANES:
            if width & plane:
                words[plane] += count * max(plane // 2, 1) * (group_size // 16)
