"""Properties of the quantization math."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimplus.format.affine import (
    SCALE_BITS,
    QuantizedWeight,
    binary_qparams,
    choose_qparams,
    dequantize,
    nearest_integers,
    per_column,
    quantize,
    storable_scale,
    storable_zero_point,
    uniform_bits,
)
from slimplus.format.planes import count_bits, pack, packed_shapes, packed_size, unpack
from slimplus.quantization import salience_calibration as calibration
from slimplus.quantization.least_squares import output_error, refit_qparams
from slimplus.quantization.linear import QuantizationConfig, quantize_linear
from slimplus.quantization.salience import HessianAccumulator, group_salience, invert_hessian
from slimplus.quantization.salience_allocation import AllocationSearch, largest_pair_count, paired_bits
from slimplus.quantization.salience_calibration import CalibrationConfig, calibrate_group

GROUP_SIZES = (16, 32, 64, 128)


@st.composite
def quantized_weights(draw: st.DrawFn) -> QuantizedWeight:
    """A random quantized weight of any shape and mix of widths, with scales of either size."""
    group_size = draw(st.sampled_from(GROUP_SIZES))
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 3 * group_size))
    groups = -(-in_features // group_size)
    bits = torch.tensor(draw(st.lists(st.integers(1, 8), min_size=groups, max_size=groups)), dtype=torch.int32)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = per_column(2**bits - 1, group_size, in_features)
    integers = (torch.rand(out_features, in_features, generator=generator) * (largest + 1)).to(torch.uint8)
    scale_bits = draw(st.sampled_from(SCALE_BITS))
    magnitude = 10.0 ** draw(st.integers(-7, 6))
    scale = storable_scale(torch.rand(out_features, groups, generator=generator) * magnitude, scale_bits)
    zero_point = storable_zero_point(torch.rand(out_features, groups, generator=generator) * 2**bits, bits)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits)


@given(quantized_weights())
@settings(max_examples=60)
def test_packing_round_trip_is_exact(weight: QuantizedWeight) -> None:
    group_size = weight.group_size
    packed = pack(weight)
    rows, columns = weight.integers.shape
    back = unpack(packed, rows, columns, group_size)
    assert torch.equal(back.integers, weight.integers)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.zero_point, weight.zero_point)
    assert torch.equal(back.bits, weight.bits)
    assert back.scale_bits == weight.scale_bits
    assert torch.equal(back.dequantize(), weight.dequantize())
    layout = (weight.integers.shape[0], count_bits(weight.bits), group_size, weight.scale_bits)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == packed_shapes(*layout)
    assert sum(t.nbytes for t in packed.values()) == packed_size(*layout)


@given(
    st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(SCALE_BITS),
)
@settings(max_examples=200)
@example([[1e6, 1.0, 0.0]], 8)
@example([[2.0**-7, 1e-3, 0.0]], 8)
@example([[2.0**-8, 1e-3, 0.0]], 8)
def test_a_stored_scale_is_the_nearest(rows: list[list[float]], scale_bits: int) -> None:
    """To half a step of ten bits of mantissa, or of five."""
    real = torch.tensor(rows)
    stored = storable_scale(real, scale_bits)
    assert torch.equal(storable_scale(stored, scale_bits), stored)
    assert (stored > 0).all()
    assert torch.equal(stored.half().float(), stored)
    normal = (real > 2.0**-14) & (real < 2.0**15)
    if scale_bits == 8:
        largest = stored.amax(1, keepdim=True)
        smallest = torch.where(largest < 2.0**-7, 2.0**-19, largest / 256)  # below, the last octave is subnormal
        assert (stored >= smallest).all()
        normal &= real >= largest / 128
    assert ((stored - real).abs() <= real / (64 if scale_bits == 8 else 2048))[normal].all()


def test_the_8_bit_scales_are_the_documented_ones() -> None:
    """Of a row, stored group after group: five bits of mantissa, and three of an exponent above the row's."""
    scale = torch.tensor([[1.5, 0.0302734375, 0.011]])
    ones = torch.ones(1, 3)
    weight = QuantizedWeight(torch.ones(1, 48, dtype=torch.uint8), scale, ones, torch.tensor([2, 2, 2]), 16, 8)
    *codes, exponent = pack(weight)["scales"][:, 0].tolist()
    assert exponent == 15 - 7  # 1.5 has the exponent 15 of a float16, and is to have 7 above the row's
    values = [2.0 ** (code // 32 + exponent - 15) * (1 + code % 32 / 32) for code in codes]
    assert values == [1.5, 0.0302734375, 2.0**-7 * 1.40625]


def test_a_row_of_zeros_does_not_set_the_scale_of_others() -> None:
    """Its scale may be anything, and the largest of a row decides how small the others can be."""
    weight = torch.cat([torch.zeros(4, 16), 1e-3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))], 1)
    scale, zero_point = choose_qparams(weight, torch.tensor([2, 2]), 16)
    assert torch.allclose(storable_scale(scale, 8)[:, 1], scale[:, 1], rtol=1 / 64)
    levels = dequantize(quantize(weight, scale, zero_point, torch.tensor([2, 2]), 16), scale, zero_point, 16)
    assert not levels[:, :16].any()


@given(quantized_weights())
@settings(max_examples=30)
def test_a_weight_on_the_grid_rounds_to_itself(weight: QuantizedWeight) -> None:
    group_size = weight.group_size
    integers = quantize(weight.dequantize(), weight.scale, weight.zero_point, weight.bits, group_size)
    assert torch.equal(integers, weight.integers)


def test_packed_layout_is_the_documented_one() -> None:
    """One 3-bit group of 32 columns: the high two bits in plane 2, the low one in plane 1, at the documented places."""
    group_size, rows = 32, 16
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 8, (rows, group_size), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(integers, torch.ones(rows, 1), torch.zeros(rows, 1), torch.tensor([3]), group_size)
    packed = pack(weight)
    per_container = group_size // 16
    for column in range(group_size):
        i, j, h = column // (2 * per_container), column // 2 % per_container, column % 2
        low = (packed["qplane1"][j].int() >> (8 * h + i)) & 1
        high = (packed["qplane2"][j] >> (16 * h + 2 * i)) & 3
        assert torch.equal((2 * high + low).to(torch.uint8), integers[:, column])


def test_a_group_size_that_cannot_be_packed() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(QuantizedWeight(one.to(torch.uint8), one, one, torch.tensor([1]), 24))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_error_is_at_most_half_a_step(bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    widths = torch.tensor([bits])
    scale, zero_point = choose_qparams(weight, widths, 64)
    error = (dequantize(quantize(weight, scale, zero_point, widths, 64), scale, zero_point, 64) - weight).abs()
    if bits == 1:  # two levels do not span the range
        assert torch.equal(error.amax(1) > scale[:, 0] / 2, torch.ones(8, dtype=torch.bool))
    else:
        assert (error <= scale / 2 + 1e-6).all()


def test_binary_levels_are_the_mean_plus_and_minus_the_mean_magnitude() -> None:
    tile = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    scale, zero_point = binary_qparams(tile)
    levels = torch.tensor([0.0, 1.0]).sub(zero_point).mul(scale)
    torch.testing.assert_close(levels, torch.tensor([1 - 2.5, 1 + 2.5]))


def test_ties_round_as_in_the_reference() -> None:
    weight = torch.tensor([0.5, 1.5, -0.5, 2.5])
    ours = nearest_integers(weight, torch.tensor(1.0), torch.tensor(1.0), 7)
    assert torch.equal(ours, torch.round(weight) + 1)


@given(st.integers(1, 400), st.sampled_from(GROUP_SIZES), st.integers(2, 7), st.integers(0, 2**32), st.integers(0, 20))
@settings(max_examples=100)
def test_the_average_is_kept_exactly(in_features: int, group_size: int, target: int, seed: int, pairs: int) -> None:
    groups = -(-in_features // group_size)
    salience = torch.rand(groups, generator=torch.Generator().manual_seed(seed))
    pairs = min(pairs, largest_pair_count(in_features, group_size))
    bits = paired_bits(salience, pairs, target, in_features, group_size)
    assert int(per_column(bits, group_size, in_features).sum()) == target * in_features
    assert int((bits != target).sum()) == 2 * pairs
    if pairs:
        assert salience[bits < target].max() <= salience[bits > target].min()


def test_no_pair_is_chosen_where_mixing_does_not_pay() -> None:
    """Equal groups of Gaussian weights: taking a bit from one costs more than giving it to another returns."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 512, generator=generator), torch.randn(256, 512, generator=generator)
    search = AllocationSearch(weight, torch.rand(8, generator=generator), 3, 64)
    search.add(inputs)
    assert int(search.divergence.argmin()) == 0


def test_search_adds_up_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 256, generator=generator), torch.randn(64, 256, generator=generator)
    whole, parts = (AllocationSearch(weight, torch.arange(8.0), 2, 32) for _ in range(2))
    whole.add(inputs)
    for batch in inputs.split(16):
        parts.add(batch)
    torch.testing.assert_close(whole.divergence, parts.divergence, rtol=1e-4, atol=0)


def test_larger_weight_of_salient_elements_moves_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(32, 64, generator=generator)
    salience = tile.square()
    plain, _ = calibrate_group(tile, salience, 2)
    weighted, _ = calibrate_group(tile, salience, 2, CalibrationConfig(salient_weight=50.0))
    assert weighted.mean() > plain.mean()  # the salient ones here are the largest: they ask for a wider range


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ranges_tried_together_are_those_tried_one_by_one(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    tile = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = calibrate_group(tile, tile.square(), bits)
    for at_once in (7, 101):
        monkeypatch.setattr(calibration, "_ranges_at_once", lambda _, count=at_once: count)
        assert all(map(torch.equal, calibrate_group(tile, tile.square(), bits), expected))


def _layer(rows: int = 32, columns: int = 160) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    accumulator = HessianAccumulator(columns, torch.device("cpu"))
    accumulator.add(torch.randn(4 * columns, columns, generator=generator) @ mixing)
    return weight, accumulator.hessian


def test_error_compensation_lowers_the_output_error() -> None:
    weight, hessian = _layer()
    bits, inverse = uniform_bits(160, 64, 3), invert_hessian(hessian)
    methods = {}
    for method in ("rtn", "gptq", "slimllm"):
        config = QuantizationConfig(method, 3, 64)
        quantized = quantize_linear(weight, bits, hessian, inverse, config).weight
        levels = quantized.dequantize()
        methods[method] = float(output_error(levels - weight, hessian).sum())
    assert methods["gptq"] < 0.9 * methods["rtn"]
    assert methods["slimllm"] < 0.9 * methods["gptq"]


def test_refit_never_makes_a_row_worse() -> None:
    weight, hessian = _layer()
    quantized = quantize_linear(
        weight, uniform_bits(160, 64, 2), hessian, invert_hessian(hessian), QuantizationConfig("gptq", 2, 64)
    ).weight
    before = quantized.dequantize()
    after = dequantize(quantized.integers, *refit_qparams(weight, quantized, hessian), 64)
    old, new = output_error(before - weight, hessian), output_error(after - weight, hessian)
    assert (new <= old).all()
    assert new.sum() < 0.9 * old.sum()


@pytest.mark.parametrize("method", ["rtn", "gptq", "slimllm"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_can_be_stored(method: str, bits: int) -> None:
    weight, hessian = _layer()
    widths = paired_bits(torch.arange(3.0), 0, bits, 160, 64)
    widths[0] -= 1
    config = QuantizationConfig(method, bits, 64)  # type: ignore[arg-type]
    quantized = quantize_linear(weight, widths, hessian, invert_hessian(hessian), config).weight
    assert (quantized.integers <= per_column(2**widths - 1, 64, 160)).all()
    assert torch.equal(storable_scale(quantized.scale), quantized.scale)
    assert torch.equal(storable_zero_point(quantized.zero_point, widths), quantized.zero_point)


def test_dead_columns_become_zero_and_the_hessian_is_left_alone() -> None:
    weight, hessian = _layer()
    hessian[:, 7] = hessian[7] = 0
    before = hessian.clone()
    inverse = invert_hessian(hessian)
    quantized = quantize_linear(
        weight, uniform_bits(160, 64, 4), hessian, inverse, QuantizationConfig("gptq", 4, 64)
    ).weight
    assert torch.equal(hessian, before)
    assert inverse.dead.nonzero().flatten().tolist() == [7]
    assert (quantized.dequantize()[:, 7] == 0).all()


def test_groups_whose_inputs_are_always_zero_are_not_salient() -> None:
    weight, hessian = _layer()
    hessian = hessian * 1e-3  # so that the ones in the places of dead columns are large
    hessian[:64] = hessian[:, :64] = 0
    salience = group_salience(weight, invert_hessian(hessian), 64)
    assert salience[0] == 0
    assert (salience[1:] > 0).all()


def test_a_layer_that_is_never_fed_anything_keeps_its_grid() -> None:
    weight, _ = _layer()
    nothing = torch.zeros(160, 160)
    config = QuantizationConfig("gptq", 2, 64)
    quantized = quantize_linear(weight, uniform_bits(160, 64, 2), nothing, invert_hessian(nothing), config).weight
    scale, zero_point = refit_qparams(weight, quantized, nothing)
    assert torch.equal(scale, quantized.scale)
    assert torch.equal(zero_point, quantized.zero_point)


def test_damping_rises_until_the_hessian_can_be_inverted(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.eye(4) - 0.05 * torch.ones(4, 4)
    hessian[0, 1] = hessian[1, 0] = 1.0  # no longer positive definite
    inverse = invert_hessian(hessian, percdamp=0.01)
    assert inverse.percdamp > 0.01
    assert torch.isfinite(inverse.upper).all()
    assert "damping raised" in caplog.text


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "NaN"), (-5.0, "singular")])
def test_a_hessian_that_cannot_be_inverted(value: float, message: str) -> None:
    hessian = torch.eye(4)
    hessian[2, 2] = value
    with pytest.raises(ValueError, match=message):
        invert_hessian(hessian)


def test_hessian_is_accumulated_in_float32_under_autocast() -> None:
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    accumulator = HessianAccumulator(32, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.add(inputs.view(2, 32, 32))
    assert accumulator.tokens == 64
    torch.testing.assert_close(accumulator.hessian, 2 / 64 * inputs.T @ inputs, rtol=1e-5, atol=1e-5)
