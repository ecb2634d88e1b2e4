"""Sensitivity of a loss to the width of each group of a linear layer, measured for every group and width."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from slimplus.format.affine import uniform_bits
from slimplus.quantization.gptq import quantize_weight
from slimplus.quantization.salience import SHRINKAGE, HessianAccumulator, invert_hessian
from slimplus.quantization.salience_calibration import CalibrationConfig, calibrate_group

# Fewer steps over wider ranges than in calibration: widths are compared here, so no grid has to be the best one.
SEARCH = CalibrationConfig(steps=6, reach=0.4)


class GradientStatistics:
    """Curvature of a loss with respect to a linear layer's weight, in the Kronecker form of K-FAC (arXiv 1503.05671).

    A weight error `e` changes the layer's output for the input `x_t` by `e x_t` and costs `½ (g_t · e x_t)²`, with the
    gradient `g_t` of the loss for that output (Fisher information). The curvature is kept as a Hessian of the inputs,
    in which each token counts by the squared magnitude of its gradient, and a factor for each row.

    Args:
        in_features: columns of the layer's weight.
        out_features: rows of the layer's weight.
        device: device of the sums.

    Attributes:
        inputs: accumulator of `Σ |g_t|² x_t x_tᵀ`, `[in, in]`.
        rows: `Σ g_t²`, `[out]`, float64; the sums of several ranks can be added.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self.inputs = HessianAccumulator(in_features, device)
        self.rows = torch.zeros(out_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the tokens of `inputs` `[..., in]` with the `gradient` of the loss for their outputs `[..., out]`."""
        squares = gradient.float().square()
        self.inputs.add(inputs.float() * squares.sum(-1, keepdim=True).sqrt())
        self.rows += squares.flatten(0, -2).sum(0)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.inputs.tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        self.inputs.tokens = tokens

    def merge(self, other: GradientStatistics) -> None:
        """Add the tokens that `other` has seen."""
        self.inputs.merge(other.inputs)
        self.rows += other.rows

    def shrunk(self, shared: GradientStatistics) -> GradientStatistics:
        """Return the statistics of an expert, shrunk to those of all experts, `shared`, as `shrunk_hessian` does.

        They are those of as many tokens as the expert has seen, so that a group that few tokens reach costs little.
        """
        rows, columns = len(self.rows), len(self.inputs.total)
        prior = SHRINKAGE * columns
        result = GradientStatistics(columns, rows, self.rows.device)
        share, count = prior / max(shared.tokens, 1), max(self.tokens, 1) / (self.tokens + prior)
        result.inputs.total = (self.inputs.total + share * shared.inputs.total) * count
        result.rows = self.rows + share * shared.rows
        result.tokens = self.tokens
        return result


def group_sensitivity(
    weight: Tensor,
    statistics: GradientStatistics,
    widths: Sequence[int],
    group_size: int,
    percdamp: float,
    integer_zero_points: bool = False,
) -> Tensor:
    """Return the loss that each group adds at each width, `[widths, groups]`, summed over the tokens.

    The layer is quantized once at each width, with error compensation. A group's loss is that of its rounding errors
    after the later groups have compensated what they can.

    Args:
        weight: the weight, `[out, in]`, float32.
        statistics: curvature of the loss.
        widths: widths in the order of the result's rows.
        group_size: columns a group.
        percdamp: damping of the Hessian, as a share of its mean diagonal.
        integer_zero_points: whether zero points must be integers.

    Raises:
        ValueError: if the Hessian of the statistics cannot be inverted.
    """
    inverse = invert_hessian(statistics.inputs.total.float(), percdamp)
    rows = (statistics.rows / statistics.rows.sum().clamp(min=torch.finfo(torch.float64).tiny)).float()
    choose = partial(calibrate_group, config=SEARCH, integer_zero_points=integer_zero_points)
    table = []
    for width in widths:
        bits = uniform_bits(weight.shape[1], group_size, width)
        rounded = quantize_weight(
            weight, bits, group_size, inverse, choose, True, integer_zero_points=integer_zero_points
        )
        table.append(rows @ rounded.loss)
    return torch.stack(table)
