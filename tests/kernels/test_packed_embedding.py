"""The lookup in a packed embedding by one launch, under Triton's interpreter, against the lookup of PyTorch."""

from __future__ import annotations

import pytest

from tests.support.processes import run_code

pytest.importorskip("triton")

CHECK = """
import torch
from slimplus.format.affine import QuantizedWeight, per_column, storable_scale, storable_zero_point
from slimplus.nn import PackedEmbedding
from slimplus.nn.backends.triton import packed_embedding

generator = torch.Generator().manual_seed(0)
cases = [(16, 16, 16, (8,)), (37, 300, 32, (1, 2, 3, 4, 5, 6, 7, 8)), (130, 640, 64, (2, 3)), (50, 1200, 128, (4, 8))]
for (rows, columns, group_size, widths), scale_bits, scale in zip(cases, (16, 8, 16, 8), (1.0, 7.3, 1.0, 13.7)):
    groups = -(-columns // group_size)
    bits = torch.tensor(widths, dtype=torch.int32)[torch.randint(len(widths), (groups,), generator=generator)]
    levels = per_column(2**bits, group_size, columns)
    integers = (torch.rand(rows, columns, generator=generator) * levels).to(torch.uint8)
    stored = storable_scale(torch.rand(rows, groups, generator=generator), scale_bits)
    zero_point = storable_zero_point(torch.rand(rows, groups, generator=generator) * 2**bits, bits)
    weight = QuantizedWeight(integers, stored, zero_point, bits, group_size, scale_bits)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        embedding = PackedEmbedding.from_quantized(weight, dtype)
        embedding.embed_scale = scale
        for tokens in (torch.randint(rows, (1,), generator=generator), torch.randint(rows, (21,), generator=generator)):
            found = embedding._launch(tokens)
            expected = embedding(tokens)
            if dtype == torch.bfloat16:  # which the interpreter cuts off where it should round
                torch.testing.assert_close(found, expected, rtol=2**-7 if scale == 1 else 2**-6, atol=0)
            else:
                assert torch.equal(found, expected), (rows, dtype)
        outside = embedding._launch(torch.tensor([1, rows, -1]))
        assert outside.isnan().tolist() == [[False] * columns, [True] * columns, [True] * columns]
tensors = list(embedding.packed_tensors().values())
counts = embedding.bit_counts
arguments = (tokens, tensors, list(counts), list(counts.values()), rows, columns, group_size, torch.float16, 2.0)
torch.library.opcheck(packed_embedding, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_the_launch_looks_up_what_pytorch_does() -> None:
    run_code(CHECK, TRITON_INTERPRET="1")


COMPILE = """
import torch
from benchmarks.gpu.machine_code import compiling_for, disassemble
from slimplus.kernels.fused import ONES
from slimplus.kernels.packed_embedding import TOKENS, packed_embedding_kernel

planes = (torch.int16, torch.int32, torch.int32, torch.int32)
for architecture in (80, 89, 90, 100, 120):
    for widths, group_size, scales in (((8,), 128, torch.float16), (range(1, 9), 64, torch.uint8)):
        tensors = (torch.int64, *planes, scales, torch.uint8, torch.int16, torch.bfloat16)
        sizes = (1, 32000, 4096, 32, 32000, ONES[torch.float16], 1.5, *[3] * 7)
        constants = dict(WIDTHS=sum(1 << width for width in widths), GROUP_SIZE=group_size, SCALED=True, TOKENS=TOKENS)
        with compiling_for(architecture):
            compiled = packed_embedding_kernel.warmup(*tensors, *sizes, **constants, grid=(1,))
        code = disassemble(compiled)
        assert code.stack == code.local == code.spills == 0, (architecture, widths, code.registers)
"""


@pytest.mark.slow
def test_the_lookup_spills_no_registers() -> None:
    run_code(COMPILE)
