"""The grid: scales and zero points, and the integers between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slimplus.format.affine import (
    SCALE_BITS,
    SMALLEST_SCALE,
    QuantizedWeight,
    binary_qparams,
    choose_qparams,
    dequantize,
    grid_positions,
    lost_to_storage,
    nearest_integers,
    one_sided_qparams,
    per_column,
    quantize,
    storable_scale,
    storable_zero_point,
    tile_qparams,
    uniform_bits,
)
from tests.support.weights import quantized_weights


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


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_position_on_a_grid_rounds_to_the_nearest_integer(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(4, 40)
    widths = torch.full((3,), bits)
    scale, zero_point = choose_qparams(weight, widths, 16)
    integers = quantize(weight, scale, zero_point, widths, 16)
    quantized = QuantizedWeight(integers, scale, zero_point, widths, 16)
    beyond = 3 * weight  # some of it lies beyond the ends of the grid
    position = grid_positions(beyond, quantized)
    expected = quantize(beyond, scale, zero_point, widths, 16)
    assert torch.equal(position.round().to(torch.uint8), expected)
    inside = (beyond / per_column(scale, 16, 40) + per_column(zero_point, 16, 40) - position).abs() < 1e-6
    assert 0.1 < inside.float().mean() < 1


def test_binary_levels_are_the_mean_plus_and_minus_the_mean_magnitude() -> None:
    tile = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    scale, zero_point = binary_qparams(tile)
    levels = torch.tensor([0.0, 1.0]).sub(zero_point).mul(scale)
    torch.testing.assert_close(levels, torch.tensor([1 - 2.5, 1 + 2.5]))


def test_ties_round_as_in_the_reference() -> None:
    weight = torch.tensor([0.5, 1.5, -0.5, 2.5])
    ours = nearest_integers(weight, torch.tensor(1.0), torch.tensor(1.0), 7)
    assert torch.equal(ours, torch.round(weight) + 1)


def nearest(weight: torch.Tensor, bits: int, group_size: int, scale_bits: int) -> QuantizedWeight:
    """The weight rounded to nearest and stored."""
    widths = uniform_bits(weight.shape[1], group_size, bits)
    scale, zero_point = choose_qparams(weight, widths, group_size)
    scale, zero_point = storable_scale(scale, scale_bits), storable_zero_point(zero_point, widths)
    integers = quantize(weight, scale, zero_point, widths, group_size)
    return QuantizedWeight(integers, scale, zero_point, widths, group_size, scale_bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_scales_that_cannot_be_stored_are_found(bits: int, scale_bits: int) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0  # needs no scale
    assert not lost_to_storage(weight, nearest(weight, bits, 32, scale_bits)).any()
    tiny = weight.clone()
    tiny[3] *= 2.0**-25
    assert lost_to_storage(tiny, nearest(tiny, bits, 32, scale_bits)).nonzero()[:, 0].tolist() == [3, 3, 3]
    huge = weight * 2.0**26
    found = lost_to_storage(huge, nearest(huge, bits, 32, scale_bits))
    assert found.sum() == found.numel() - 1
    uneven = weight.clone()
    uneven[2, 40] *= 2.0**16  # in the second group, 8 octaves and more above the others of its row
    found = lost_to_storage(uneven, nearest(uneven, bits, 32, scale_bits))
    assert found.nonzero().tolist() == ([[2, 0], [2, 2]] if scale_bits == 8 else [])


@given(st.lists(st.floats(-300, 600), min_size=1, max_size=30), st.integers(1, 8))
@settings(max_examples=50)
def test_an_integer_zero_point_is_the_nearest_one_of_the_integers_of_the_grid(values: list[float], bits: int) -> None:
    wanted = torch.tensor(values, dtype=torch.float32)
    found = storable_zero_point(wanted, torch.tensor(bits), integer=True)
    grid = torch.arange(2**bits, dtype=torch.float32)
    assert torch.isin(found, grid).all()
    assert torch.equal((found - wanted).abs(), (grid - wanted[:, None]).abs().amin(1))
    assert torch.equal(storable_zero_point(found, torch.tensor(bits)), found)  # which is on the finer grid as well


def test_a_1_bit_group_with_an_integer_zero_point_has_the_level_0_and_one_on_the_heavier_side() -> None:
    tile = torch.tensor([[1.0, 0.1, 1.2, -0.4], [-3.0, -0.1, 0.9, -3.2], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    scale, zero_point = one_sided_qparams(tile)
    torch.testing.assert_close(scale, torch.tensor([1.1, 3.1, SMALLEST_SCALE, 5.0]))
    assert zero_point.tolist() == [0, 1, 0, 0]


def test_the_range_of_weights_of_one_sign_reaches_to_0() -> None:
    tile = 3 + torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
    for sign, end in ((1, 0), (-1, 7)):
        scale, zero_point = tile_qparams(sign * tile, 3, integer=True)
        assert (zero_point == end).all()
        torch.testing.assert_close(scale * 7, tile.amax(1))
