"""Layers in training: what they round to is what gets packed, and their gradients are those of the levels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimplus.format.affine import (
    SCALE_BITS,
    QuantizedWeight,
    choose_qparams,
    quantize,
    storable_scale,
    storable_zero_point,
)
from slimplus.nn import FakeQuantizedLinear, LearnedRoundingLinear, PackedLinear, TrainedWeightLinear
from slimplus.nn.fake_quantized import ScaledLinear, ScaledRoundingLinear
from slimplus.nn.levels import nearest_level
from slimplus.quantization.gptq import RoundedWeight, quantize_weight
from slimplus.quantization.salience import invert_hessian
from slimplus.quantization.salience_calibration import calibrate_group
from tests.support.blocks import GROUP_SIZE


def _quantized(rows: int, columns: int, bits: list[int], seed: int = 0) -> QuantizedWeight:
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    widths = torch.tensor(bits, dtype=torch.int32)
    scale, zero_point = choose_qparams(target, widths, GROUP_SIZE)
    scale, zero_point = storable_scale(scale), storable_zero_point(zero_point, widths)
    return QuantizedWeight(
        quantize(target, scale, zero_point, widths, GROUP_SIZE), scale, zero_point, widths, GROUP_SIZE
    )


@given(
    st.integers(1, 33),
    st.integers(1, 100),
    st.lists(st.integers(1, 8), min_size=4, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
)
@settings(max_examples=60)
@example(rows=21, columns=48, bits=[1, 1, 1, 1], seed=1, with_bias=False)  # a scale of 1e-6, a zero point far outside
def test_fake_quantized_equals_packed_bit_for_bit(
    rows: int, columns: int, bits: list[int], seed: int, with_bias: bool
) -> None:
    """Whatever training made of the shifts, wild values included."""
    weight = _quantized(rows, columns, bits[: -(-columns // GROUP_SIZE)], seed)
    bias = torch.randn(rows) if with_bias else None
    layer = FakeQuantizedLinear(weight, bias)
    generator = torch.Generator().manual_seed(seed)
    for shift in (layer.low_shift, layer.high_shift):
        shift.data += torch.randn(shift.shape, generator=generator)
    packed = PackedLinear.from_quantized(layer.quantized_weight(), bias)
    assert torch.equal(packed.dequantize(), layer.fake_quantized_weight())
    inputs = torch.randn(3, columns, generator=generator)
    # The same weight, laid out otherwise.
    torch.testing.assert_close(packed(inputs), layer(inputs), rtol=1e-5, atol=1e-5)


def test_untrained_quantizers_are_the_calibrated_ones() -> None:
    weight = _quantized(16, 128, [1, 2, 3, 4])
    trained = FakeQuantizedLinear(weight, None).quantized_weight()
    for name in ("integers", "scale", "zero_point", "bits"):
        assert torch.equal(getattr(trained, name), getattr(weight, name)), name


KINDS = (FakeQuantizedLinear, ScaledLinear, LearnedRoundingLinear, ScaledRoundingLinear, TrainedWeightLinear)
any_weight = given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 100),
    bits=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    scale_bits=st.sampled_from(SCALE_BITS),
    integer=st.booleans(),
)


def _rounded(
    rows: int, columns: int, bits: list[int], seed: int = 0, scale_bits: int = 16, integer: bool = False
) -> RoundedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, 0] = 9.0  # beyond the ends of its grid
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inverse = invert_hessian(inputs.T @ inputs)
    widths = torch.tensor(bits[: -(-columns // GROUP_SIZE)], dtype=torch.int32)
    choose = partial(calibrate_group, integer_zero_points=integer)
    return quantize_weight(weight, widths, GROUP_SIZE, inverse, choose, True, scale_bits, integer)


def _layer(kind: type[FakeQuantizedLinear], rounded: RoundedWeight, bias: Tensor | None = None) -> FakeQuantizedLinear:
    if issubclass(kind, LearnedRoundingLinear | TrainedWeightLinear):
        return kind(rounded.weight, bias, None, rounded.remainder)
    return kind(rounded.weight, bias)


@pytest.mark.parametrize("kind", KINDS)
@any_weight
@settings(max_examples=15)
def test_training_starts_from_what_was_calibrated(
    kind: type[FakeQuantizedLinear], rows: int, columns: int, bits: list[int], seed: int, scale_bits: int, integer: bool
) -> None:
    rounded = _rounded(rows, columns, bits, seed, scale_bits, integer)
    start = _layer(kind, rounded).quantized_weight()
    assert torch.equal(start.integers, rounded.weight.integers)
    assert torch.equal(start.scale, rounded.weight.scale)
    assert torch.equal(start.zero_point, rounded.weight.zero_point)


@pytest.mark.parametrize("kind", KINDS)
@any_weight
@settings(max_examples=15)
def test_whatever_was_learned_is_packed_bit_for_bit(
    kind: type[FakeQuantizedLinear], rows: int, columns: int, bits: list[int], seed: int, scale_bits: int, integer: bool
) -> None:
    layer = _layer(kind, _rounded(rows, columns, bits, seed, scale_bits, integer), torch.ones(rows))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*layer.grid, *layer.per_weight):
        parameter.data = 2 * torch.rand(parameter.shape, generator=generator) - 1
    trained = layer.quantized_weight()
    packed = PackedLinear.from_quantized(trained, layer.bias)
    assert torch.equal(packed.to_linear().weight, layer.fake_quantized_weight())
    assert torch.equal(packed.quantized_weight().zero_point, trained.zero_point)
    if integer:
        assert torch.equal(trained.zero_point, trained.zero_point.round())
        assert (trained.zero_point >= 0).all()
        assert (trained.zero_point <= 2**trained.bits - 1).all()


@pytest.mark.parametrize("kind", [ScaledLinear, ScaledRoundingLinear])
def test_zero_points_that_are_not_learned_get_no_gradient_and_no_change(kind: type[FakeQuantizedLinear]) -> None:
    layer = _layer(kind, _rounded(8, 64, [2, 3], integer=True))
    layer.fake_quantized_weight().sum().backward()
    assert [parameter.grad is not None for parameter in layer.grid] == [True]
    assert not layer.low_shift.requires_grad
    layer.high_shift.data.fill_(0.7)
    assert torch.equal(layer.quantized_weight().zero_point, layer.zero_point)
    assert (layer.quantized_weight().scale > layer.scale).all()


def test_an_integer_zero_point_is_trained_through_its_rounding() -> None:
    """Weights beyond an end of the grid pull it, by half a step at least before it moves by a whole one."""
    layer = _layer(TrainedWeightLinear, _rounded(8, 64, [2, 3], integer=True))
    layer.fake_quantized_weight().sum().backward()
    assert layer.low_shift.grad is not None
    assert layer.low_shift.grad.any()
    inner = layer.zero_point[:, 1] >= 1
    assert inner.any()
    for shift, change in ((0.3, 0), (0.7, -1)):
        layer.low_shift.data.fill_(shift)
        layer.high_shift.data.fill_(shift)  # the scale stays
        moved = layer.quantized_weight().zero_point[:, 1] - layer.zero_point[:, 1]
        assert (moved[inner] == change).all()


def test_an_offset_moves_a_weight_by_one_level_at_most() -> None:
    rounded = _rounded(8, 64, [2, 3])
    layer = _layer(LearnedRoundingLinear, rounded)
    for sign in (-0.5, 0.5):
        layer.per_weight[0].data.fill_(sign)
        change = layer.quantized_weight().integers.int() - rounded.weight.integers.int()
        assert set(change.unique().tolist()) <= {0, int(2 * sign)}
        assert change.any()


def test_gradients_are_those_of_the_levels() -> None:
    """The offset's is the weight's times the scale, and none where the weight lies beyond the ends of the grid."""
    layer = _layer(LearnedRoundingLinear, _rounded(8, 64, [2, 3]))
    scale, _ = layer.qparams()
    layer.per_weight[0].data[0, 0, 0] = 5.0
    layer.fake_quantized_weight().sum().backward()
    gradient = layer.per_weight[0].grad
    assert gradient is not None
    assert gradient[0, 0, 0] == 0
    assert torch.equal(gradient[:, 1], scale[:, 1:].expand(-1, GROUP_SIZE))


def test_gradients_are_those_of_autograd_with_the_rounding_passed_straight_through() -> None:
    generator = torch.Generator().manual_seed(0)
    position = 6 * torch.rand(3, 2, GROUP_SIZE, generator=generator) - 1.5
    scale, zero_point = (torch.rand(3, 2, 1, generator=generator) + 0.5 for _ in range(2))
    largest = torch.tensor([[3.0], [1.0]])
    slope = torch.randn(position.shape, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (position, scale, zero_point)]
    levels = nearest_level(position, largest, scale, zero_point)
    gradients = torch.autograd.grad((levels * slope).sum(), leaves)
    clamped = position.minimum(largest).clamp(min=0)
    inside = (position.round() >= 0) & (position.round() <= largest)
    place = torch.where(inside, position, clamped.detach())
    integers = place + (clamped.round() - place).detach()
    chain = (integers - zero_point) * scale
    assert torch.equal(levels, ((clamped.round() - zero_point) * scale))
    for found, wanted in zip(gradients, torch.autograd.grad((chain * slope).sum(), leaves), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_grid_under_frozen_integers_are_those_of_autograd() -> None:
    layer = FakeQuantizedLinear(_rounded(8, 64, [2, 3]).weight, None).double()
    scale, zero_point = (values[..., None].detach().requires_grad_() for values in layer.qparams())
    slope = torch.randn(layer.integers.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels, chain = layer.levels(scale, zero_point), (layer.integers - zero_point) * scale
    assert torch.equal(levels, chain)
    wanted = torch.autograd.grad((chain * slope).sum(), (scale, zero_point))
    for found, expected in zip(torch.autograd.grad((levels * slope).sum(), (scale, zero_point)), wanted, strict=True):
        assert torch.allclose(found, expected)


def test_trained_weights_follow_the_straight_through_estimator() -> None:
    layer = _layer(TrainedWeightLinear, _rounded(8, 64, [2, 3]))
    layer.fake_quantized_weight().sum().backward()
    gradient = layer.per_weight[0].grad
    assert gradient is not None
    assert ((gradient - 1).abs() < 1e-6).logical_or(gradient == 0).all()
    assert (gradient != 0).any()


def test_a_rate_of_zero_freezes_the_groups_of_a_width() -> None:
    rounded = _rounded(8, 64, [2, 3])
    layer = LearnedRoundingLinear(rounded.weight, None, {3: 0.0}, rounded.remainder)
    layer.fake_quantized_weight().square().sum().backward()
    for parameter in (*layer.grid, *layer.per_weight):
        assert parameter.grad is not None
        assert parameter.grad[:, 0].any()
        assert not parameter.grad[:, 1].any()
