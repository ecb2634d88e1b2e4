"""Products with packed weights: the kernels under Triton's interpreter, and what the host does without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from slimplus.format.affine import QuantizedWeight, choose_qparams
from slimplus.format.planes import count_bits, pack
from slimplus.kernels.fused import can_multiply, fuse_shards, split_shards
from slimplus.kernels.launch import LaunchConfig
from slimplus.kernels.packed_matmul import packed_matmul

ROOT = Path(__file__).resolve().parents[1]
CPU_LAUNCH = LaunchConfig(32, 8, 1, 4, 1)


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when it is imported.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/interpreted_packed_matmul.py"],
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


def test_shards_come_back_as_they_went_in_and_share_memory() -> None:
    weights = [quantized(20, 96, [1, 2, 3]), quantized(5, 96, [4, 4, 2]), quantized(33, 96, [3, 3, 3])]
    packed, counts, rows = [pack(each) for each in weights], [count_bits(each.bits) for each in weights], [20, 5, 33]
    fused, shape = fuse_shards(packed, counts, rows, 96, 32)
    assert (shape.out_features, shape.columns, shape.widths) == ((20, 5, 33), 58, (1, 2, 3, 4))
    shards = split_shards(fused, counts, rows, 32)
    for original, shard in zip(packed, shards, strict=True):
        assert set(shard) == set(original) - {"group_bits"}
        for name, tensor in shard.items():
            assert torch.equal(tensor, original[name])
            assert tensor.untyped_storage().data_ptr() == fused[name].untyped_storage().data_ptr()


def test_a_single_weight_is_not_copied() -> None:
    weight = quantized(20, 96, [2, 2, 3])
    packed = pack(weight)
    fused, shape = fuse_shards([packed], [count_bits(weight.bits)], [20], 96, 32)
    assert shape.widths == (2, 3)
    assert all(fused[name].data_ptr() == packed[name].data_ptr() for name in ("qplane1", "qplane2", "scales", "zeros"))
    assert fused["qplane4"].numel() == 0


def test_what_no_kernel_multiplies_is_refused() -> None:
    assert can_multiply({1: 3, 4: 2}, 128)
    assert not can_multiply({2: 3, 5: 1}, 128)
    assert not can_multiply({2: 3}, 48)
    weight = quantized(20, 96, [2, 5, 3])
    with pytest.raises(ValueError, match="no kernel for groups of 32 columns"):
        fuse_shards([pack(weight)], [count_bits(weight.bits)], [20], 96, 32)
    with pytest.raises(ValueError, match="does not describe 3 groups"):
        fuse_shards([pack(weight)], [{2: 2}], [20], 96, 32)


@pytest.mark.parametrize(("tokens", "dtype"), [(257, torch.float16), (1, torch.float32)])
def test_inputs_the_kernel_cannot_take_are_refused(tokens: int, dtype: torch.dtype) -> None:
    weight = quantized(20, 96, [2, 2, 3])
    fused, shape = fuse_shards([pack(weight)], [count_bits(weight.bits)], [20], 96, 32)
    counters = torch.zeros(shape.counters, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"not {tokens} of {dtype}"):
        packed_matmul(torch.zeros(tokens, 96, dtype=dtype), fused, shape, counters, launch=CPU_LAUNCH)


def test_too_few_counters_are_refused() -> None:
    weight = quantized(20, 96, [2, 2, 3])
    fused, shape = fuse_shards([pack(weight)], [count_bits(weight.bits)], [20], 96, 32)
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
