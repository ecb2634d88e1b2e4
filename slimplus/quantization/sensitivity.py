"""What it costs the model to give a group of input columns few bits: measured, for every group and width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimplus.format.affine import uniform_bits
from slimplus.quantization.gptq import quantize_weight
from slimplus.quantization.salience import HessianAccumulator, invert_hessian
from slimplus.quantization.salience_calibration import CalibrationConfig, calibrate_group

# Coarser and further than the search of a calibration: it need not find the best grid, but treat all widths alike.
SEARCH = CalibrationConfig(steps=6, reach=0.4)


class GradientStatistics:
    """What a loss makes of a linear layer's output error: its curvature, in the Kronecker form of K-FAC.

    An error `e x_t` of the output for the input `x_t` costs `½ (g_t · e x_t)²`, g being the gradient of the loss
    (Fisher information, arXiv 1503.05671). It is held as a Hessian of the inputs, in which a token counts by the
    magnitude of its gradient, and a share for each row.

    Attributes:
        inputs: `Σ |g_t|² x_t x_tᵀ`, `[in, in]`.
        rows: `Σ g_t²`, `[out]`, float64. A sum, so that ranks may add theirs up.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self.inputs = HessianAccumulator(in_features, device)
        self.rows = torch.zeros(out_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the tokens of `inputs` `[..., in]`, with the gradient of the loss for their outputs, `[..., out]`."""
        squares = gradient.float().square()
        self.inputs.add(inputs.float() * squares.sum(-1, keepdim=True).sqrt())
        self.rows += squares.flatten(0, -2).sum(0)


def group_sensitivity(
    weight: Tensor, statistics: GradientStatistics, widths: Sequence[int], group_size: int, percdamp: float
) -> Tensor:
    """The loss a layer adds when a group has a width, `[widths, groups]`, summed over the tokens.

    The layer is quantized once at each width with error compensation; a group's share is what is left of its errors.

    Args:
        weight: `[out, in]`, float32.
        statistics: of the loss.
        widths: in the order of the result's rows.
        group_size: columns a group.
        percdamp: damping of the Hessian.
    """
    inverse = invert_hessian(statistics.inputs.total.float(), percdamp)
    rows = (statistics.rows / statistics.rows.sum().clamp(min=torch.finfo(torch.float64).tiny)).float()
    table = []
    for width in widths:
        bits = uniform_bits(weight.shape[1], group_size, width)
        rounded = quantize_weight(weight, bits, group_size, inverse, _choose, compensate=True)
        table.append(rows @ rounded.loss)
    return torch.stack(table)


def _choose(tile: Tensor, salience: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return calibrate_group(tile, salience, bits, SEARCH)
