"""The kernel that rounds columns, under Triton's interpreter, against the PyTorch reference."""

from __future__ import annotations

import pytest

from tests.support.processes import run_code

pytest.importorskip("triton")

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
    run_code(ROUND, TRITON_INTERPRET="1")


COMPILE_ROUND = """
import torch
from benchmarks.gpu.machine_code import compiling_for, disassemble
from slimplus.kernels.round_columns import _round_columns_kernel, choose_blocks

tensors = [torch.float32] * 5
for architecture in (80, 89, 90):
    for columns in (32, 64, 128, 256):
        with compiling_for(architecture):
            compiled = _round_columns_kernel.warmup(*tensors, 4096, columns, 3, **choose_blocks(columns), grid=(1,))
        code = disassemble(compiled)
        assert code.stack == code.local == code.spills == 0, (architecture, columns, code.registers)
"""


@pytest.mark.slow
def test_rounding_columns_spills_no_registers() -> None:
    run_code(COMPILE_ROUND)
