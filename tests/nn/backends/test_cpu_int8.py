"""PyTorch's int8 operator on a CPU, for packed layers wider than 4 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from slimplus.format.affine import per_column
from slimplus.nn import PackedLinear, prepare_inference
from slimplus.nn.backends.cpu_int4 import Int4Weight
from slimplus.nn.backends.cpu_int8 import MAX_ROWS, Int8Weight, int8_linear
from tests.support.layers import TOLERANCE, inputs_of, random_weight, relative_error


@given(
    group_size=st.sampled_from([32, 64, 96, 128, 512]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 700),
    rows=st.integers(1, 5),
    widths=st.sets(st.integers(1, 8), min_size=1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
@example(group_size=32, out_features=32, in_features=1, rows=2, widths={1}, seed=1098)
def test_int8_is_as_exact_as_bfloat16(
    group_size: int, out_features: int, in_features: int, rows: int, widths: set[int], seed: int
) -> None:
    weights = [random_weight(out_features + extra, in_features, group_size, tuple(widths), seed) for extra in (0, 3)]
    inputs = inputs_of(rows, in_features)
    bias = torch.arange(2 * out_features + 3.0)
    found = Int8Weight.from_quantized(weights, bias).linear(inputs)
    expected = inputs.double() @ torch.cat([weight.dequantize() for weight in weights]).double().T + bias
    assert found.dtype == inputs.dtype
    # What is rounded is the distance from the grid's centre, up to half of it wherever the zero point lies.
    rounded = [
        weight.dequantize().abs() + per_column(weight.scale * 2.0 ** (weight.bits - 1), group_size, in_features)
        for weight in weights
    ]
    largest = inputs.double().abs() @ torch.cat(rounded).double().T + bias
    assert ((found - expected).abs() <= TOLERANCE * largest + 1e-9).all()


@pytest.mark.parametrize(
    ("widths", "form"), [((2, 4), Int4Weight), ((2, 5), Int8Weight), ((8,), Int8Weight)], ids=["4", "5", "8"]
)
def test_the_widths_decide_the_form(widths: tuple[int, ...], form: type) -> None:
    layer = PackedLinear.from_quantized(random_weight(24, 256, 32, widths), torch.randn(24))
    module = nn.Sequential(layer)
    inputs = inputs_of(2, 256)
    exact = nn.functional.linear(inputs.double(), layer.dequantize().double(), layer.bias.double())  # type: ignore[union-attr]
    (projections,) = prepare_inference(module)
    assert relative_error(module(inputs), exact) < TOLERANCE
    assert type(projections._backend) is form
    many = inputs_of(MAX_ROWS + 400, 256)
    assert torch.equal(module(many), nn.functional.linear(many, layer.dequantize(many.dtype), layer.bias.bfloat16()))  # type: ignore[union-attr]
    assert layer(inputs[0, 0]).shape == (24,)
    assert not projections.supports(torch.float32, 1)
    assert not projections.supports(torch.bfloat16, 0)


def test_the_operator_is_registered_soundly() -> None:
    weight = Int8Weight.from_quantized([random_weight(20, 100, 32, (6, 8))])
    arguments = (inputs_of(2, 100), weight.int8, weight.scales, weight.offsets, torch.ones(20))
    torch.library.opcheck(int8_linear, arguments)
