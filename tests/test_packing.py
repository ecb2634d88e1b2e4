"""The packed layout of the wide planes, and that packing costs no Python per weight."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch

from slimplus.format.affine import QuantizedWeight
from slimplus.format.planes import pack, unpack

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
