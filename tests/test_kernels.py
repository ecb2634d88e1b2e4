"""Triton kernels, under its interpreter, against the PyTorch reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def _run(code: str, **environment: str) -> None:
    # A process of its own: Triton reads the variable when it is imported.
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_dequantize_equals_the_reference_bit_for_bit() -> None:
    _run(CHECK, TRITON_INTERPRET="1")


COMPILE = """
from slimplus.kernels.dequantize import _dequantize_kernel
from tests.sass import compile_kernel

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
    _run(COMPILE)


ROUND = """
import torch
from slimplus.kernels.round_columns import round_columns
from slimplus.format.affine import storable_scale, storable_zero_point
from slimplus.quantization.gptq import _round_columns

generator = torch.Generator().manual_seed(0)
for rows, columns, bits in ((5, 16, 1), (40, 64, 2), (33, 40, 3), (70, 128, 4), (16, 16, 8)):
    inputs = torch.randn(400, 3 * columns, generator=generator)
    hessian = inputs.T @ inputs / 400
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)[columns:-columns, columns:-columns]
    tile = 3 * torch.randn(rows, columns, generator=generator)
    scale = storable_scale(torch.rand(rows, 1, generator=generator) / 2**bits)[:, 0]
    zero_point = storable_zero_point(torch.rand(rows, generator=generator) * 2**bits, torch.tensor(bits))
    expected, found = tile.clone(), tile.clone()
    errors = _round_columns(expected, upper, scale, zero_point, 2**bits - 1)
    assert torch.equal(round_columns(found, upper, scale, zero_point, 2**bits - 1), errors), (rows, columns, bits)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tile)
"""


def test_columns_are_rounded_as_the_reference_rounds_them() -> None:
    _run(ROUND, TRITON_INTERPRET="1")


COMPILE_ROUND = """
from slimplus.kernels.round_columns import _round_columns_kernel, choose_blocks
from tests.sass import compile_kernel

names = ("tile", "upper", "scale", "zero_point", "errors")
for architecture in (80, 89, 90):
    for columns in (32, 64, 128, 256):
        blocks, pointers = choose_blocks(columns), dict.fromkeys(names, "*fp32")
        code = compile_kernel(_round_columns_kernel, pointers, blocks, architecture, 4)
        assert code.stack == code.local == 0, (architecture, columns, code.registers)
"""


@pytest.mark.slow
def test_rounding_columns_spills_no_registers() -> None:
    _run(COMPILE_ROUND)
