"""Weights that make up for the error in their inputs."""

from __future__ import annotations

import pytest
import torch

from slimplus.quantization.error_propagation import PairedAccumulator, compensated_weight
from slimplus.quantization.salience import invert_hessian


def test_a_weight_approximates_the_output_on_inputs_in_full_precision() -> None:
    """Whatever the quantized weight, both objectives differ by the same number."""
    torch.manual_seed(0)
    weight, full = torch.randn(8, 16), torch.randn(400, 16)
    quantized = full + 0.5 * torch.randn(400, 16) @ torch.randn(16, 16)
    sums = PairedAccumulator(16, torch.device("cpu"))
    for windows in zip(full.split(100), quantized.split(100), strict=True):
        sums.add_pair(*windows)
    compensated = compensated_weight(weight, sums.cross_product, invert_hessian(sums.hessian, 1e-7), strength=1)
    gaps = []
    for _ in range(4):
        approximation = weight + torch.randn(8, 16)
        wanted = (full @ weight.T - quantized @ approximation.T).square().sum()
        gaps.append(float(wanted - (quantized @ (compensated - approximation).T).square().sum()))
    assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-3)
    assert gaps[0] > 0


def test_nothing_is_made_up_for_where_inputs_are_right_or_the_strength_is_0() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 16), torch.randn(50, 16)
    for full, strength in ((inputs, 1.0), (inputs + 1, 0.0)):
        sums = PairedAccumulator(16, torch.device("cpu"))
        sums.add_pair(full, inputs)
        inverse = invert_hessian(sums.hessian, 0.01)
        assert torch.equal(compensated_weight(weight, sums.cross_product, inverse, strength), weight)
