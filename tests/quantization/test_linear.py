"""The quantization of one weight matrix by each method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimplus.format.affine import (
    SCALE_BITS,
    QuantizedWeight,
    per_column,
    storable_scale,
    storable_zero_point,
    uniform_bits,
)
from slimplus.format.planes import pack, unpack
from slimplus.quantization.gptq import quantize_weight
from slimplus.quantization.least_squares import output_error, refit_qparams
from slimplus.quantization.linear import QuantizationConfig, _minmax, quantize_embedding_or_head, round_weight
from slimplus.quantization.salience import invert_hessian
from slimplus.quantization.salience_allocation import paired_bits
from tests.support.weights import layer_and_hessian


def test_error_compensation_lowers_the_output_error() -> None:
    weight, hessian = layer_and_hessian()
    bits, inverse = uniform_bits(160, 64, 3), invert_hessian(hessian)
    methods = {}
    for method in ("rtn", "gptq", "slimllm"):
        config = QuantizationConfig(method, 3, 64)
        quantized = round_weight(weight, bits, hessian, inverse, config).weight
        levels = quantized.dequantize()
        methods[method] = float(output_error(levels - weight, hessian).sum())
    assert methods["gptq"] < 0.9 * methods["rtn"]
    assert methods["slimllm"] < 0.9 * methods["gptq"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "slimllm"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_can_be_stored(method: str, bits: int) -> None:
    weight, hessian = layer_and_hessian()
    widths = paired_bits(torch.arange(3.0), 0, bits, 160, 64)
    widths[0] -= 1
    config = QuantizationConfig(method, bits, 64)  # type: ignore[arg-type]
    quantized = round_weight(weight, widths, hessian, invert_hessian(hessian), config).weight
    assert (quantized.integers <= per_column(2**widths - 1, 64, 160)).all()
    assert torch.equal(storable_scale(quantized.scale), quantized.scale)
    assert torch.equal(storable_zero_point(quantized.zero_point, widths), quantized.zero_point)


@pytest.mark.parametrize("method", ["gptq", "slimllm"])
@pytest.mark.parametrize("dead", [slice(7, 8), slice(0, 64), slice(50, 90)], ids=["column", "group", "across groups"])
def test_dead_columns_are_rounded_to_nearest_and_the_hessian_is_left_alone(method: str, dead: slice) -> None:
    weight, hessian = layer_and_hessian()
    hessian[:, dead] = hessian[dead] = 0
    before = hessian.clone()
    inverse = invert_hessian(hessian)
    rounded = round_weight(weight, uniform_bits(160, 64, 4), hessian, inverse, QuantizationConfig(method, 4, 64))  # type: ignore[arg-type]
    assert torch.equal(hessian, before)
    assert inverse.dead.nonzero().flatten().tolist() == list(range(160))[dead]
    error = (rounded.weight.dequantize() - weight)[:, dead]
    steps = per_column(rounded.weight.scale, 64, 160)[:, dead]
    # The levels of SliM-LLM's ranges, which may be narrower than the weights, are fitted after the rounding.
    assert (error.abs() <= (0.501 if method == "gptq" else 2) * steps).all()
    assert error.norm() < 0.15 * weight[:, dead].norm()


def test_dead_columns_cost_no_loss() -> None:
    weight, hessian = layer_and_hessian()
    hessian[:, :64] = hessian[:64] = 0
    inverse = invert_hessian(hessian)
    for compensate in (False, True):
        loss = quantize_weight(weight, uniform_bits(160, 64, 2), 64, inverse, _minmax, compensate).loss
        assert (loss[:, 0] == 0).all()
        assert (loss[:, 1:] > 0).all()


def test_a_layer_that_is_never_fed_anything_keeps_its_grid() -> None:
    weight, _ = layer_and_hessian()
    nothing = torch.zeros(160, 160)
    config = QuantizationConfig("gptq", 2, 64)
    quantized = round_weight(weight, uniform_bits(160, 64, 2), nothing, invert_hessian(nothing), config).weight
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


def _config(bits: int, group_size: int = 16) -> QuantizationConfig:
    return QuantizationConfig("slimllm", bits, group_size)


def test_the_head_minds_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimplus.quantization import linear

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    inputs = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = 2 * inputs.T @ inputs / 500
    calibrated, plain = (quantize_embedding_or_head(weight, h, _config(4)) for h in (hessian, None))

    def errors(quantized: Any) -> tuple[float, float]:
        difference = quantized.dequantize() - weight
        return float(output_error(difference, hessian).sum()), float(difference.square().sum())

    assert errors(calibrated)[0] < 0.6 * errors(plain)[0]
    assert errors(plain)[1] < errors(calibrated)[1]
    # The rows are independent: how many are taken at a time changes nothing but the memory that is needed.
    monkeypatch.setattr(linear, "VOCABULARY_ROWS", 40)
    split = quantize_embedding_or_head(weight, hessian, _config(4))
    torch.testing.assert_close(split.dequantize(), calibrated.dequantize(), rtol=0, atol=1e-5)
    assert split.integers.shape == weight.shape


@given(
    st.sampled_from(["rtn", "gptq", "slimllm"]),
    st.lists(st.integers(1, 8), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.7, -3.0]),
    st.sampled_from(SCALE_BITS),
)
@settings(max_examples=12)
def test_integer_zero_points_lie_on_the_grid_and_are_packed_to_the_bit(
    method: Any, widths: list[int], mean: float, scale_bits: int
) -> None:
    """Also where all weights have one sign, so that 0 lies outside their range."""
    weight, hessian = layer_and_hessian(rows=9)
    bits = torch.tensor(widths, dtype=torch.int32)
    config = QuantizationConfig(method, 3, 64, scale_bits=scale_bits, integer_zero_points=True)
    quantized = round_weight(weight + mean, bits, hessian, invert_hessian(hessian), config).weight
    assert torch.equal(quantized.zero_point, quantized.zero_point.round())
    assert (quantized.zero_point >= 0).all()
    assert (quantized.zero_point <= 2**bits - 1).all()
    read = unpack(pack(quantized), 9, 160, 64)
    assert torch.equal(read.zero_point, quantized.zero_point)
    assert torch.equal(read.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_that_are_integers_all_along_cost_less_than_rounding_them_at_the_end(bits: int) -> None:
    weight, hessian = layer_and_hessian()
    widths, inverse = uniform_bits(160, 64, bits), invert_hessian(hessian)

    def error(found: QuantizedWeight) -> float:
        return float(output_error(found.dequantize() - weight, hessian).sum())

    fractional, integer = (
        round_weight(weight, widths, hessian, inverse, QuantizationConfig("slimllm", bits, 64, integer_zero_points=on))
        for on in (False, True)
    )
    zero_point = storable_zero_point(fractional.weight.zero_point, widths, integer=True)
    late = replace(fractional.weight, zero_point=zero_point)
    assert error(integer.weight) < 0.95 * error(late)
