"""Tests of the kernels over packed weights.

tests/kernels/test_packed_matmul.py runs them by pytest with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import kernels as benchmark
from slimplus.format.affine import SCALE_BITS, QuantizedWeight, per_column, storable_scale, storable_zero_point
from slimplus.format.planes import count_bits, pack
from slimplus.kernels.fused import FusedShape, fuse_layers
from slimplus.kernels.launch import LaunchConfig
from slimplus.kernels.measure import random_weights
from slimplus.kernels.packed_matmul import packed_matmul
from slimplus.kernels.tune import tune, tune_shape

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = LaunchConfig(block_n=32, block_m=8, split_k=1, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class Case:
    """Random packed weights that read the same input, and that input."""

    weights: list[QuantizedWeight]
    fused: dict[str, Tensor]
    shape: FusedShape
    inputs: Tensor
    bias: Tensor | None
    counters: Tensor

    def multiply(self, launch: LaunchConfig) -> Tensor:
        """The kernel's product, after a check that it left its counters at zero."""
        result = packed_matmul(self.inputs, self.fused, self.shape, self.counters, self.bias, launch)
        assert not self.counters.any()
        return result

    def check(self, launch: LaunchConfig) -> None:
        """Every element within the tolerance of float64, as a part of the sum of the terms' magnitudes."""
        weight = torch.cat([weight.dequantize() for weight in self.weights]).double()
        bias = torch.zeros(len(weight)) if self.bias is None else self.bias
        inputs = self.inputs.double()
        exact = inputs @ weight.T + bias.double()
        result = self.multiply(launch).double()
        tolerance = TOLERANCE[self.inputs.dtype]
        assert torch.linalg.norm(result - exact) <= tolerance * torch.linalg.norm(exact)
        assert ((result - exact).abs() <= tolerance * (inputs.abs() @ weight.abs().T + bias.abs())).all()


def make_case(
    out_features: Sequence[int] = (48,),
    in_features: int = 256,
    group_size: int = 64,
    widths: Sequence[int] = (1, 2, 3, 4),
    tokens: int = 3,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    seed: int = 0,
    scale_bits: int = 16,
) -> Case:
    """Weights of random widths out of `widths`, with zero points that are no integers."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    weights = []
    for rows in out_features:
        bits = torch.tensor(widths, dtype=torch.int32)[torch.randint(len(widths), (groups,), generator=generator)]
        levels = per_column(2**bits, group_size, in_features)
        integers = (torch.rand(rows, in_features, generator=generator) * levels).to(torch.uint8)
        scale = storable_scale(torch.rand(rows, groups, generator=generator), scale_bits)
        zero_point = storable_zero_point(torch.rand(rows, groups, generator=generator) * 2**bits, bits)
        weights.append(QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits))
    counts = [count_bits(weight.bits) for weight in weights]
    fused, shape = fuse_layers([pack(weight) for weight in weights], counts, out_features, in_features, group_size)
    inputs = torch.randn(tokens, in_features, generator=generator).to(dtype)
    addend = torch.randn(shape.columns, generator=generator).to(dtype) if bias else None
    return Case(weights, fused, shape, inputs, addend, torch.zeros(shape.counters, dtype=torch.int32))


LAUNCHES = st.builds(
    LaunchConfig,
    block_n=st.sampled_from((16, 32, 64)),
    block_m=st.sampled_from((8, 16, 32)),
    split_k=st.integers(1, 5),
    num_warps=st.just(4),
    num_stages=st.just(2),
)


@given(
    out_features=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    in_features=st.integers(1, 330),
    group_size=st.sampled_from((16, 32, 64, 128)),
    widths=st.sets(st.integers(1, 4), min_size=1),
    tokens=st.integers(1, 36),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
    bias=st.booleans(),
    launch=LAUNCHES,
    seed=st.integers(0, 2**16),
    scale_bits=st.sampled_from(SCALE_BITS),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_products_match_float64(
    out_features: list[int],
    in_features: int,
    group_size: int,
    widths: set[int],
    tokens: int,
    dtype: torch.dtype,
    bias: bool,
    launch: LaunchConfig,
    seed: int,
    scale_bits: int,
) -> None:
    widths_of = sorted(widths)
    make_case(out_features, in_features, group_size, widths_of, tokens, dtype, bias, seed, scale_bits).check(launch)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "widths", "tokens"),
    [
        ((32,), 256, 64, (1,), 5),
        ((32,), 256, 64, (2,), 5),
        ((32,), 256, 64, (3,), 5),
        ((32,), 256, 64, (4,), 5),
        ((16,), 128, 128, (2,), 1),  # one group
        ((37, 5, 70), 300, 128, (1, 2, 3, 4), 17),  # ragged rows, ragged last group, layers of different sizes
        ((33,), 40, 32, (1, 3), 100),
    ],
)
def test_chosen_products_match_float64(
    out_features: tuple[int, ...],
    in_features: int,
    group_size: int,
    widths: tuple[int, ...],
    tokens: int,
    block_m: int,
    dtype: torch.dtype,
) -> None:
    make_case(out_features, in_features, group_size, widths, tokens, dtype, bias=True).check(
        LaunchConfig(32, block_m, 2, 4, 2)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "widths", "tokens", "scale_bits"),
    [
        ((32,), 128, 64, (5,), 3, 16),
        ((32,), 128, 64, (6,), 3, 16),
        ((32,), 128, 64, (7,), 3, 16),
        ((32,), 128, 64, (8,), 3, 16),
        ((37, 5), 700, 64, (1, 2, 3, 4, 5, 6, 7, 8), 9, 8),  # ragged rows, ragged last group
        ((37,), 200, 32, (2, 8), 1, 16),
        ((16,), 512, 256, (4, 8), 16, 16),
    ],
)
def test_wide_products_match_float64(
    out_features: tuple[int, ...],
    in_features: int,
    group_size: int,
    widths: tuple[int, ...],
    tokens: int,
    scale_bits: int,
    dtype: torch.dtype,
) -> None:
    """As exact as a product with 16-bit inputs can be: the weights' integers are not rounded."""
    case = make_case(out_features, in_features, group_size, widths, tokens, dtype, scale_bits=scale_bits)
    launch = LaunchConfig(32, 8 if tokens <= 8 else 16, 3, 4, 2)
    case.check(launch)
    exact = case.inputs.double() @ torch.cat([weight.dequantize() for weight in case.weights]).double().T
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]  # of the output, which the interpreter cuts off
    error = torch.linalg.norm(case.multiply(launch).double() - exact)
    assert error <= 1.2 * step * torch.linalg.norm(exact)


def test_wide_products_are_those_of_few_tokens() -> None:
    case = make_case(tokens=17, widths=(2, 5))
    with pytest.raises(ValueError, match="at most 16 tokens of float16 or bfloat16, not 17"):
        case.multiply(SMALL)


def test_chosen_launches_match_float64() -> None:
    """Without a launch given, whatever the number of tokens."""
    for tokens in (1, 8, 9, 16, 17, 33, 256):
        case = make_case((130, 20), 200, 64, tokens=tokens)
        exact = case.inputs.double() @ torch.cat([weight.dequantize() for weight in case.weights]).double().T
        result = packed_matmul(case.inputs, case.fused, case.shape, case.counters)
        assert torch.linalg.norm(result.double() - exact) <= 2e-3 * torch.linalg.norm(exact)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "split_k"), [(1, 4), (1, 19), (2, 19), (17, 9)])
def test_more_programs_than_groups_share_them(tokens: int, split_k: int, dtype: torch.dtype) -> None:
    """Some programs get none; every group is multiplied once."""
    make_case((40, 21), 300, 32, tokens=tokens, dtype=dtype, bias=True).check(
        LaunchConfig(32, 8 if tokens <= 8 else 32, split_k, 4, 2)
    )


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("tokens", [3, 20])
def test_results_repeat_bit_for_bit_and_overwrite_everything(tokens: int, split_k: int) -> None:
    case = make_case((40, 21), 300, 64, tokens=tokens)
    launch = LaunchConfig(32, 16 if tokens <= 16 else 32, split_k, 4, 2)
    first = case.multiply(launch)
    torch.use_deterministic_algorithms(True)  # fills every new tensor with NaN
    try:
        assert case.inputs.new_empty(1).isnan().all()
        second = case.multiply(launch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_padding_is_never_read_into_a_result() -> None:
    """Rows beyond the last hold NaN scales: tiles are full of them, outputs are not."""
    case = make_case((20,), 128, 64, tokens=2)
    scales = case.fused["scales"].view(2, 32)
    scales[:, 20:] = torch.nan
    case.check(SMALL)
    case = make_case((20,), 128, 64, tokens=2, scale_bits=8)
    case.fused["scales"].view(3, 32)[:, 20:] = 255
    case.check(SMALL)


def test_inputs_need_not_be_contiguous() -> None:
    case = make_case(tokens=4)
    expected = case.multiply(SMALL)
    strided = case.inputs.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(packed_matmul(strided, case.fused, case.shape, case.counters, None, SMALL), expected)


def count_calls(calls: Sequence[Callable[[], Tensor]]) -> float:
    """A timer under which every call takes a second."""
    return float(len([call() for call in calls]))


def test_tuning_finds_the_fastest_launch() -> None:
    def timer(calls: Sequence[Callable[[], Tensor]]) -> float:
        count_calls(calls)
        inputs, launch = cast("partial[Tensor]", calls[0]).args
        assert inputs.shape == (8, 256)
        return abs(launch.block_n - 128) + launch.num_warps + launch.num_stages

    tuned = tune(((32, 16), 256), 64, (1, 2, 3), torch.bfloat16, torch.device("cpu"), timer, buckets=(8,))
    assert tuned == {"8": {"block_n": 128, "block_m": 8, "split_k": 1, "num_warps": 2, "num_stages": 3}}


def test_tuning_stops_at_a_launch_that_multiplies_wrongly() -> None:
    weights = random_weights((32,), 128, 64, (2,), torch.device("cpu"))
    weights.counters.fill_(7)  # no program takes itself for the last, and none writes a result
    with pytest.raises(RuntimeError, match="multiplies wrongly"):
        tune_shape([weights], 8, torch.float16, count_calls, [LaunchConfig(64, 8, 2, 2, 3)])


def test_the_benchmark_measures_every_mix_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MODELS, "tiny", {"gate_up": ((16, 16), 256)})
    rows = benchmark.measure([("tiny", "gate_up")], (1, 257), torch.device("cpu"), count_calls)
    assert [(row["bits"], row["tokens"]) for row in rows] == [(mix, t) for mix in benchmark.MIXES for t in (1, 257)]
    assert [row["launch"] is None for row in rows] == [False, True] * 5
    assert rows[0]["seconds"] == {"slimplus": 1.0, "cublas": 1.0, "gemlite": None}
    assert rows[0]["bytes"] == 32 * 256 // 4 + 32 * 2 * 3 + 2 * 2 * 2 + 2 * 32 * 4  # 2 bits, 2 groups, layer table
