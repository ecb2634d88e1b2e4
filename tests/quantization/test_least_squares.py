"""The least-squares refit of scales and zero points."""

from __future__ import annotations

from slimplus.format.affine import (
    dequantize,
    uniform_bits,
)
from slimplus.quantization.least_squares import output_error, refit_qparams
from slimplus.quantization.linear import QuantizationConfig, round_weight
from slimplus.quantization.salience import invert_hessian
from tests.support.weights import layer_and_hessian


def test_refit_never_makes_a_row_worse() -> None:
    weight, hessian = layer_and_hessian()
    quantized = round_weight(
        weight, uniform_bits(160, 64, 2), hessian, invert_hessian(hessian), QuantizationConfig("gptq", 2, 64)
    ).weight
    before = quantized.dequantize()
    after = dequantize(quantized.integers, *refit_qparams(weight, quantized, hessian), 64)
    old, new = output_error(before - weight, hessian), output_error(after - weight, hessian)
    assert (new <= old).all()
    assert new.sum() < 0.9 * old.sum()
