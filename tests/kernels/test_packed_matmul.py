"""Products with packed weights: the kernels under Triton's interpreter, and what the host does without a device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from slimplus.format.affine import QuantizedWeight, choose_qparams
from slimplus.format.planes import count_bits, pack
from slimplus.kernels.fused import fuse_layers
from slimplus.kernels.launch import LaunchConfig
from slimplus.kernels.packed_matmul import packed_matmul
from tests.support.processes import ROOT

pytest.importorskip("triton")

CPU_LAUNCH = LaunchConfig(32, 8, 1, 4, 1)


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when it is imported.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/support/interpreted_packed_matmul.py",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def quantized(rows: int, columns: int, widths: list[int], group_size: int = 32) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    bits = torch.tensor(widths, dtype=torch.int32)
    scale, zero_point = choose_qparams(weight, bits, group_size)
    return QuantizedWeight(torch.ones(rows, columns, dtype=torch.uint8), scale, zero_point, bits, group_size)


@pytest.mark.parametrize(("tokens", "dtype"), [(257, torch.float16), (1, torch.float32)])
def test_inputs_the_kernel_cannot_take_are_refused(tokens: int, dtype: torch.dtype) -> None:
    weight = quantized(20, 96, [2, 2, 3])
    fused, shape = fuse_layers([pack(weight)], [count_bits(weight.bits)], [20], 96, 32)
    counters = torch.zeros(shape.counters, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"not {tokens} of {dtype}"):
        packed_matmul(torch.zeros(tokens, 96, dtype=dtype), fused, shape, counters, launch=CPU_LAUNCH)


def test_too_few_counters_are_refused() -> None:
    weight = quantized(20, 96, [2, 2, 3])
    fused, shape = fuse_layers([pack(weight)], [count_bits(weight.bits)], [20], 96, 32)
    counters = torch.zeros(shape.counters, dtype=torch.int32)
    with pytest.raises(ValueError, match="16 counters are too few for 1 x 32 blocks"):
        packed_matmul(torch.zeros(256, 96, dtype=torch.float16), fused, shape, counters, launch=CPU_LAUNCH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_less_their_zero_points_are_exact_in_16_bits(bits: int, dtype: torch.dtype) -> None:
    """What `_centred` rests on, whose assembly only a GPU can run: no step of it rounds."""
    levels, zero_points = torch.arange(2**bits).double() / 2**bits, torch.arange(256).double() / 256
    centred = levels[:, None] - zero_points
    steps = [1 + levels, centred, zero_points if dtype == torch.bfloat16 else 1 + zero_points]
    for step in steps:
        assert torch.equal(step.to(dtype).double(), step)
