"""The packed format: what goes in comes out, it lies as documented, and packing costs no Python per weight."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from hypothesis import given, settings

from slimplus.format.affine import (
    QuantizedWeight,
)
from slimplus.format.planes import count_bits, pack, packed_shapes, packed_size, unpack
from tests.support.weights import quantized_weights


@given(quantized_weights())
@settings(max_examples=60)
def test_packing_round_trip_is_exact(weight: QuantizedWeight) -> None:
    group_size = weight.group_size
    packed = pack(weight)
    rows, columns = weight.integers.shape
    back = unpack(packed, rows, columns, group_size)
    assert torch.equal(back.integers, weight.integers)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.zero_point, weight.zero_point)
    assert torch.equal(back.bits, weight.bits)
    assert back.scale_bits == weight.scale_bits
    assert torch.equal(back.dequantize(), weight.dequantize())
    layout = (weight.integers.shape[0], count_bits(weight.bits), group_size, weight.scale_bits)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == packed_shapes(*layout)
    assert sum(t.nbytes for t in packed.values()) == packed_size(*layout)


def test_the_8_bit_scales_are_the_documented_ones() -> None:
    """Of a row, stored group after group: five bits of mantissa, and three of an exponent above the row's."""
    scale = torch.tensor([[1.5, 0.0302734375, 0.011]])
    ones = torch.ones(1, 3)
    weight = QuantizedWeight(torch.ones(1, 48, dtype=torch.uint8), scale, ones, torch.tensor([2, 2, 2]), 16, 8)
    *codes, exponent = pack(weight)["scales"][:, 0].tolist()
    assert exponent == 15 - 7  # 1.5 has the exponent 15 of a float16, and is to have 7 above the row's
    values = [2.0 ** (code // 32 + exponent - 15) * (1 + code % 32 / 32) for code in codes]
    assert values == [1.5, 0.0302734375, 2.0**-7 * 1.40625]


def test_packed_layout_is_the_documented_one() -> None:
    """One 3-bit group of 32 columns: the high two bits in plane 2, the low one in plane 1, at the documented places."""
    group_size, rows = 32, 16
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 8, (rows, group_size), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(integers, torch.ones(rows, 1), torch.zeros(rows, 1), torch.tensor([3]), group_size)
    packed = pack(weight)
    per_container = group_size // 16
    for column in range(group_size):
        i, j, h = column // (2 * per_container), column // 2 % per_container, column % 2
        low = (packed["qplane1"][j].int() >> (8 * h + i)) & 1
        high = (packed["qplane2"][j] >> (16 * h + 2 * i)) & 3
        assert torch.equal((2 * high + low).to(torch.uint8), integers[:, column])


def test_a_group_size_that_cannot_be_packed() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(QuantizedWeight(one.to(torch.uint8), one, one, torch.tensor([1]), 24))


GROUP_SIZE = 32


def _weight(rows: int, columns: int, widths: tuple[int, ...] = (1, 2, 3, 8)) -> QuantizedWeight:
    bits = torch.tensor([widths[group % len(widths)] for group in range(columns // GROUP_SIZE)], dtype=torch.int32)
    largest = (2**bits - 1).repeat_interleave(GROUP_SIZE)
    generator = torch.Generator().manual_seed(0)
    integers = (torch.rand(rows, columns, generator=generator) * (largest + 1)).to(torch.uint8)
    qparams = torch.ones(rows, len(bits))
    return QuantizedWeight(integers, qparams, qparams, bits, GROUP_SIZE)


@pytest.mark.parametrize(("plane", "per_half", "width"), [(4, 4, 4), (8, 2, 8), (4, 4, 7)])
def test_wide_planes_lie_as_documented(plane: int, per_half: int, width: int) -> None:
    weight = _weight(16, GROUP_SIZE, (width,))
    words, containers = pack(weight)[f"qplane{plane}"], GROUP_SIZE // 16
    for column in range(GROUP_SIZE):
        i, j, h = column // (2 * containers), column % (2 * containers) // 2, column % 2
        shift = 16 * h + plane * (i % per_half)
        field = (words[(i // per_half) * containers + j] >> shift) & (2**plane - 1)
        assert torch.equal(field.to(torch.uint8), weight.integers[:, column] >> (width - plane)), column


def _python_calls(function: Callable[[], object]) -> int:
    """How many Python functions and C functions `function` calls."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # what others have it call would be counted
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def _calls(rows: int, groups: int) -> dict[str, int]:
    """Calls to pack, to unpack and to dequantize a weight of that size."""
    columns = groups * GROUP_SIZE
    weight = _weight(rows, columns)
    packed = pack(weight)
    back = unpack(packed, rows, columns, GROUP_SIZE)
    return {
        "pack": _python_calls(lambda: pack(weight)),
        "unpack": _python_calls(lambda: unpack(packed, rows, columns, GROUP_SIZE)),
        "dequantize": _python_calls(back.dequantize),
    }


def test_no_python_runs_per_weight() -> None:
    """Packing and unpacking take as many steps for any weight; dequantizing goes group by group."""
    small, tall, wide = _calls(16, 4), _calls(1024, 4), _calls(16, 64)
    assert min(small.values()) > 4  # or nothing was counted
    assert tall == small
    assert {**wide, "dequantize": 0} == {**small, "dequantize": 0}
    assert wide["dequantize"] <= 16 * small["dequantize"]
