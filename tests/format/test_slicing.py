"""Rows and columns cut out of packed weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimplus.format.affine import QuantizedWeight, group_count, per_column, storable_scale
from slimplus.format.planes import count_bits, pack, packed_shapes, padded_rows, unpack
from slimplus.format.slicing import slice_columns, slice_rows


def random_weight(rows: int, columns: int, group_size: int, scale_bits: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(columns, group_size)
    bits = torch.randint(1, 9, (groups,), generator=generator, dtype=torch.int32)
    levels = per_column(2**bits, group_size, columns)
    integers = (torch.rand(rows, columns, generator=generator) * levels).to(torch.uint8)
    scale = storable_scale(torch.rand(rows, groups, generator=generator) * 0.1 + 0.01, scale_bits)
    zero_point = (2.0**bits / 2).floor().expand(rows, -1)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits)


@settings(max_examples=60)
@given(
    group_size=st.sampled_from([16, 32, 48, 64, 128]),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    containers=st.integers(1, 12),
    rows=st.integers(1, 40),
    scale_bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**31),
)
def test_columns_of_each_rank_are_those_of_the_weight_bit_for_bit(
    group_size: int, ranks: int, containers: int, rows: int, scale_bits: int, seed: int
) -> None:
    """With ragged last groups, and ranks that cut groups or leave them whole."""
    own = 16 * containers
    weight = random_weight(rows, own * ranks, group_size, scale_bits, seed)
    packed = pack(weight)
    for rank in range(ranks):
        columns = range(rank * own, (rank + 1) * own)
        tensors, refined = slice_columns(packed, group_size, columns)
        counts = count_bits(tensors["group_bits"])
        shapes = packed_shapes(rows, counts, refined, scale_bits)
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == shapes
        sliced = unpack(tensors, rows, own, refined)
        assert torch.equal(sliced.integers, weight.integers[:, columns.start : columns.stop])
        expected = weight.dequantize(torch.float32)[:, columns.start : columns.stop]
        assert torch.equal(sliced.dequantize(torch.float32), expected)
        assert group_size % refined == 0
        assert refined == group_size or own % group_size  # groups are cut only where they must be


@given(
    first=st.integers(0, 39), second=st.integers(0, 39), scale_bits=st.sampled_from([8, 16]), seed=st.integers(0, 99)
)
@settings(max_examples=25)
def test_rows_are_those_of_the_weight_bit_for_bit(first: int, second: int, scale_bits: int, seed: int) -> None:
    weight = random_weight(40, 96, 32, scale_bits, seed)
    ranges = [range(min(first, second), max(first, second) + 1), range(3, 8)]
    tensors = {name: slice_rows(tensor, ranges) for name, tensor in pack(weight).items()}
    rows = [row for part in ranges for row in part]
    assert tensors["scales"].shape[1] == padded_rows(len(rows))
    sliced = unpack(tensors, len(rows), 96, 32)
    assert torch.equal(sliced.integers, weight.integers[rows])
    assert torch.equal(sliced.dequantize(torch.float32), weight.dequantize(torch.float32)[rows])


def test_a_cut_that_leaves_too_few_columns_is_refused() -> None:
    packed = pack(random_weight(4, 96, 32, 16, 0))
    with pytest.raises(ValueError, match=r"columns 24 to 47 cut groups of 32 into parts of 8, .* multiple of 16"):
        slice_columns(packed, 32, range(24, 48))
