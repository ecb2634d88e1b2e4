"""Error-compensated rounding of a linear weight, group by group (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimplus.format.affine import HALF, QuantizedWeight, nearest_integers, storable_scale, storable_zero_point
from slimplus.quantization.salience import InverseHessian

QParamsChooser = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Chooses a grid: `(tile [out, columns], salience [out, columns], bits) -> scale [out], zero_point [out]`."""


@dataclass(frozen=True)
class RoundedWeight:
    """The result of `quantize_weight`.

    Attributes:
        weight: the quantized weight, ready to pack.
        remainder: `[out, in]`, how far each compensated weight lay above its integer before it was rounded, in steps
            of the grid; at most just under half a step, also for weights beyond the ends of the grid.
        loss: `[out, groups]`, what rounding each group adds to half the layer's output error `e H eᵀ` after the later
            groups have compensated what they can.
    """

    weight: QuantizedWeight
    remainder: Tensor
    loss: Tensor


def quantize_weight(
    weight: Tensor,
    bits: Tensor,
    group_size: int,
    inverse: InverseHessian,
    choose: QParamsChooser,
    compensate: bool,
    scale_bits: int = 16,
    integer_zero_points: bool = False,
) -> RoundedWeight:
    """Quantize a weight group by group; with `compensate`, spread each column's rounding error over the later columns.

    1. Choose the group's scale and zero point from its weights, compensated so far, and their salience.
    2. Round its columns one after the other. Each column's error, divided by the diagonal of the inverse Hessian's
       Cholesky factor, moves the columns after it (GPTQ, arXiv 2210.17323, algorithm 1).

    A dead column, one that no token of the Hessian reaches, is rounded to nearest: other text may reach it.

    Args:
        weight: the weight, `[out, in]`, float32.
        bits: width of each group, `[groups]`.
        group_size: columns a group.
        inverse: inverse Hessian of the layer's inputs.
        choose: choice of a group's scale and zero point.
        compensate: whether errors are compensated; otherwise every group is rounded to nearest on its own.
        scale_bits: bits that a scale takes in the packed format. With 8, a scale more than 8 octaves below the largest
            of its row is raised at the end, when all scales of the row are known; the group keeps its integers.
        integer_zero_points: whether the zero points that `choose` gives are rounded to integers.
    """
    remaining = _workspace(weight)
    upper = inverse.upper
    integers, remainders = torch.empty_like(remaining, dtype=torch.uint8), torch.empty_like(remaining)
    scales, zero_points, losses = [], [], []
    for group, width in enumerate(bits.tolist()):
        span = slice(group * group_size, min((group + 1) * group_size, weight.shape[1]))
        tile = remaining[:, span].clone()
        diagonal = upper.diagonal()[span]
        scale, zero_point = choose(tile, tile.square() / diagonal.square(), width)
        scale = storable_scale(scale[:, None], scale_bits)[:, 0]
        zero_point = storable_zero_point(zero_point, torch.tensor(width, device=weight.device), integer_zero_points)
        scales.append(scale)
        zero_points.append(zero_point)
        if compensate:
            errors = _round_columns(tile, upper[span, span], scale, zero_point, 2**width - 1)
            errors.masked_fill_(inverse.dead[span], 0)  # they cost no loss that was measured
            remaining[:, span.stop :].addmm_(errors, upper[span, span.stop :], alpha=-1)
            losses.append(errors.square().sum(1) / 2)
        nearest = nearest_integers(tile, scale[:, None], zero_point[:, None], 2**width - 1)
        integers[:, span] = nearest.to(torch.uint8)
        remainders[:, span] = (tile / scale[:, None] + zero_point[:, None] - nearest).clamp_(-HALF, HALF)
        if not compensate:
            level = (nearest - zero_point[:, None]) * scale[:, None]
            losses.append(((tile - level) / diagonal).masked_fill(inverse.dead[span], 0).square().sum(1) / 2)
    scale = storable_scale(torch.stack(scales, 1), scale_bits)
    integers, remainders = integers.contiguous(), remainders.contiguous()
    quantized = QuantizedWeight(
        integers, scale, torch.stack(zero_points, 1), bits, group_size, scale_bits, integer_zero_points
    )
    return RoundedWeight(quantized, remainders, torch.stack(losses, 1))


def _workspace(weight: Tensor) -> Tensor:
    """Return a copy of a weight `[out, in]` that lies column by column on a CPU, where columns are rounded in turn."""
    return weight.clone() if weight.is_cuda else weight.T.clone(memory_format=torch.contiguous_format).T


def _round_columns(tile: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> Tensor:
    """Round `tile` `[out, columns]` column by column, moving each error into the columns after it, in place.

    Args:
        tile: the group's weights, float32; each column is left as it was just before it was rounded.
        upper: the group's square of the Cholesky factor, `[columns, columns]`.
        scale: scales of the group, `[out]`.
        zero_point: zero points of the group, `[out]`.
        largest: largest integer of the grid.

    Returns:
        The rounding errors over the diagonal of `upper`, `[out, columns]`, for the later groups.
    """
    if tile.is_cuda:
        from slimplus.kernels.round_columns import round_columns  # Triton, which a machine without a GPU may lack

        with torch.cuda.device_of(tile):  # Triton launches on the current device
            return round_columns(tile, upper, scale, zero_point, largest)
    errors, products, diagonal = torch.empty_like(tile), torch.empty_like(tile), upper.diagonal().tolist()
    nearest = torch.empty_like(scale)
    for column, (real, error) in enumerate(zip(tile.unbind(1), errors.unbind(1), strict=True)):
        level = nearest_integers(real, scale, zero_point, largest, nearest).sub_(zero_point).mul_(scale)
        torch.sub(real, level, out=error).div_(diagonal[column])
        later = slice(column + 1, None)
        tile[:, later] -= torch.mul(error[:, None], upper[column, later], out=products[:, later])
    return errors
