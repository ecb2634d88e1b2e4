"""The least-squares refit of scales and zero points."""

from __future__ import annotations

import torch

from slimplus.format.affine import (
    dequantize,
    uniform_bits,
)
from slimplus.quantization.least_squares import _normal_equations, _refit_scales, output_error, refit_qparams
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


def test_a_refit_of_integer_zero_points_never_makes_a_row_worse() -> None:
    weight, hessian = layer_and_hessian()
    config = QuantizationConfig("gptq", 3, 32, integer_zero_points=True)
    quantized = round_weight(weight, uniform_bits(160, 32, 3), hessian, invert_hessian(hessian), config).weight
    scale, zero_point = refit_qparams(weight, quantized, hessian)
    after = dequantize(quantized.integers, scale, zero_point, 32)
    old, new = output_error(quantized.dequantize() - weight, hessian), output_error(after - weight, hessian)
    assert (new <= old).all()
    assert new.sum() < 0.95 * old.sum()
    assert torch.equal(zero_point, zero_point.round())


def test_scales_fitted_to_given_zero_points_are_those_of_least_squares() -> None:
    """Against the solver of PyTorch, on the levels of a row before they are scaled."""
    weight, hessian = layer_and_hessian(rows=4)
    config = QuantizationConfig("rtn", 4, 32, integer_zero_points=True)
    quantized = round_weight(weight, uniform_bits(160, 32, 4), hessian, invert_hessian(hessian), config).weight
    zero_point = quantized.zero_point + torch.tensor([[1.0], [0.0], [-1.0], [0.0]])
    projected = (weight - quantized.dequantize()) @ hessian
    normal, moment = _normal_equations(quantized.integers.float(), projected, hessian, 32)
    scale = _refit_scales(quantized, normal, moment, torch.zeros(4, 1), zero_point)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(4):
        levels = quantized.integers[row].double() - zero_point[row].double().repeat_interleave(32)
        wanted = torch.linalg.lstsq(
            root @ torch.block_diag(*levels.view(5, 32)).T, root @ weight[row].double()
        ).solution
        torch.testing.assert_close(scale[row].double(), wanted, rtol=2e-3, atol=1e-4)  # scales are float16
