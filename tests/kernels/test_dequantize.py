"""The kernel that dequantizes, under Triton's interpreter, against the PyTorch reference."""

from __future__ import annotations

import pytest

from tests.support.processes import run_code

pytest.importorskip("triton")

CHECK = """
import torch
from slimplus.kernels.dequantize import dequantize
from slimplus.nn import PackedLinear
from slimplus.format.affine import QuantizedWeight, per_column, storable_scale, storable_zero_point

generator = torch.Generator().manual_seed(0)
cases = [(16, 16, 16), (5, 40, 16), (48, 320, 64), (130, 300, 128), (64, 256, 32)]
for rows, columns, group_size in cases:
    for largest_width, scale_bits in ((1, 16), (3, 16), (8, 16), (3, 8), (8, 8)):
        groups = -(-columns // group_size)
        bits = torch.randint(1, largest_width + 1, (groups,), generator=generator, dtype=torch.int32)
        levels = per_column(2**bits, group_size, columns)
        integers = (torch.rand(rows, columns, generator=generator) * levels).to(torch.uint8)
        scale = storable_scale(torch.rand(rows, groups, generator=generator), scale_bits)
        zero_point = storable_zero_point(torch.rand(rows, groups, generator=generator) * 2**bits, bits)
        weight = QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits)
        layer = PackedLinear.from_quantized(weight, None)
        ours = dequantize(layer.packed_tensors(), layer.bit_counts, rows, columns, group_size, torch.float32)
        assert torch.equal(ours, layer.dequantize()), (rows, columns, group_size, bits)
        half = dequantize(layer.packed_tensors(), layer.bit_counts, rows, columns, group_size, torch.float16)
        assert torch.equal(half, layer.dequantize().half())
"""


def test_dequantize_equals_the_reference_bit_for_bit() -> None:
    run_code(CHECK, TRITON_INTERPRET="1")


COMPILE = """
from slimplus.kernels.dequantize import _dequantize_kernel
from tests.support.sass import compile_kernel

pointers = dict(plane1="*i16", plane2="*i32", plane4="*i32", plane8="*i32", zeros="*u8")
pointers |= dict(group_index="*i16", out="*bf16")
for architecture in (80, 89, 90):
    for bits in range(1, 9):
        pointers["scales"] = "*u8" if bits == 3 else "*fp16"
        constants = dict(BITS=bits, GROUP_SIZE=128, ROWS=64)
        code = compile_kernel(_dequantize_kernel, pointers, constants, architecture, 4)
        assert code.stack == code.local == 0, (architecture, bits, code.registers)
"""


@pytest.mark.slow
def test_dequantize_spills_no_registers() -> None:
    run_code(COMPILE)
