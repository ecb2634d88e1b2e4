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


SLICES = """
import torch
from slimplus.format.planes import packed_shapes
from slimplus.kernels.dequantize import dequantized_matmul
from slimplus.kernels.measure import random_layer
from slimplus.nn import PackedLinear
from slimplus.nn.backends.triton import dequantized_linear
from tests.support.layers import relative_error

torch.manual_seed(0)
counts = {1: 1, 3: 2, 5: 1}
layer = PackedLinear.from_tensors(random_layer(200, counts, 64, torch.device("cpu")), 250, 200, 64)
packed = layer.packed_tensors()
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    inputs = torch.randn(9, 250).to(dtype)
    weight = layer.dequantize(dtype)
    for scratch_bytes in (1, 70_000, 1 << 20):  # a slice of 64 rows, of 128 or 64, of all
        for bias in (None, torch.randn(200).to(dtype)):
            side_by_side = torch.full((9, 300), 7.0, dtype=dtype)
            dequantized_matmul(inputs, packed, counts, 64, side_by_side[:, 50:250], bias, scratch_bytes)
            expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
            assert relative_error(side_by_side[:, 50:250], expected) < tolerance
            assert (side_by_side[:, :50] == 7).all() and (side_by_side[:, 250:] == 7).all()
    outputs = layer._sliced_product(inputs.view(3, 3, 250), None)
    assert relative_error(outputs, (inputs.double() @ weight.double().T).view(3, 3, 200)) < tolerance

tensors = [packed[name] for name in packed_shapes(200, counts, 64)]
arguments = (inputs, tensors, list(counts), list(counts.values()), 200, 64, None)
torch.library.opcheck(dequantized_linear, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_slices_of_a_dequantized_weight_multiply_as_the_whole_does() -> None:
    run_code(SLICES, TRITON_INTERPRET="1")


COMPILE = """
import torch
from benchmarks.gpu.machine_code import compiling_for, disassemble
from slimplus.kernels.dequantize import _dequantize_kernel
from slimplus.kernels.fused import ONES

planes = (torch.int16, torch.int32, torch.int32, torch.int32)
for architecture in (80, 89, 90):
    for bits in range(1, 9):
        scales = torch.uint8 if bits == 3 else torch.float16
        tensors = (*planes, scales, torch.uint8, torch.int16, torch.bfloat16)
        sizes = (0, 0, 0, 0, 0, 0, 4096, 4096, 32, 4096, ONES[torch.float16])
        constants = dict(BITS=bits, GROUP_SIZE=128, ROWS=64)
        with compiling_for(architecture):
            compiled = _dequantize_kernel.warmup(*tensors, *sizes, **constants, num_warps=4, grid=(1,))
        code = disassemble(compiled)
        assert code.stack == code.local == code.spills == 0, (architecture, bits, code.registers)
"""


@pytest.mark.slow
def test_dequantize_spills_no_registers() -> None:
    run_code(COMPILE)
