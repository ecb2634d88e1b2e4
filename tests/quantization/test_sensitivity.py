"""What a group's width costs, against the output error of weights quantized at that width."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from slimplus.format.affine import dequantize, uniform_bits
from slimplus.quantization.gptq import quantize_weight
from slimplus.quantization.salience import invert_hessian
from slimplus.quantization.salience_calibration import calibrate_group
from slimplus.quantization.sensitivity import SEARCH, GradientStatistics, group_sensitivity

GROUP_SIZE, PERCDAMP, WIDTHS = 32, 0.01, (1, 2, 3, 4)


def statistics(columns: int, rows: int) -> GradientStatistics:
    """Of correlated inputs and gradients of unlike rows."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    held = GradientStatistics(columns, rows, torch.device("cpu"))
    gradients = torch.randn(256, rows, generator=generator) * torch.linspace(0.1, 2, rows)
    held.add(torch.randn(256, columns, generator=generator) @ mixing, gradients)
    return held


def layer(columns: int, rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def added_loss(weight: torch.Tensor, held: GradientStatistics, width: int) -> float:
    """`½ Σ_r share_r · e_r H e_rᵀ` of the whole layer, H damped as it is for quantizing."""
    inverse = invert_hessian(held.inputs.total.float(), PERCDAMP)
    choose = partial(calibrate_group, config=SEARCH)
    bits = uniform_bits(weight.shape[1], GROUP_SIZE, width)
    found = quantize_weight(weight, bits, GROUP_SIZE, inverse, choose, compensate=True).weight
    error = (weight - dequantize(found.integers, found.scale, found.zero_point, GROUP_SIZE)).double()
    total = held.inputs.total.double()
    hessian = total + PERCDAMP * total.diagonal().mean() * torch.eye(len(total))
    share = held.rows / held.rows.sum()
    return float((share * ((error @ hessian) * error).sum(1)).sum() / 2)


@pytest.mark.parametrize("columns", [96, 80])  # the last group of 80 is a short one
def test_the_groups_of_a_width_add_up_to_the_error_of_the_layer_at_that_width(columns: int) -> None:
    weight, held = layer(columns), statistics(columns, 16)
    table = group_sensitivity(weight, held, WIDTHS, GROUP_SIZE, PERCDAMP)
    assert table.shape == (4, 3)
    for width, losses in zip(WIDTHS, table, strict=True):
        assert float(losses.sum()) == pytest.approx(added_loss(weight, held, width), rel=1e-3)
