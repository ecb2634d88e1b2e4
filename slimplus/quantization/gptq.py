"""Error-compensated rounding (GPTQ, arXiv 2210.17323); a group's scale and zero point are chosen when it is reached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimplus.quantization.affine import QuantizedWeight, nearest_integers, storable_scale, storable_zero_point
from slimplus.quantization.salience import InverseHessian

QParamsChooser = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""`(tile [out, columns], salience [out, columns], bits) -> scale [out], zero_point [out]`."""


def quantize_weight(
    weight: Tensor,
    bits: Tensor,
    group_size: int,
    inverse: InverseHessian,
    choose: QParamsChooser,
    compensate: bool,
) -> QuantizedWeight:
    """Quantize group by group, and with `compensate` spread each column's rounding error over the later columns.

    Args:
        weight: `[out, in]`, float32.
        bits: `[groups]`.
        group_size: columns a group.
        inverse: of the Hessian of the layer's inputs.
        choose: picks scale and zero point from the group as compensated so far.
        compensate: error compensation; without it every group is rounded to nearest on its own.
    """
    remaining = weight.masked_fill(inverse.dead, 0)
    upper = inverse.upper
    integers = torch.empty_like(remaining, dtype=torch.uint8)
    scales, zero_points = [], []
    for group, width in enumerate(bits.tolist()):
        span = slice(group * group_size, min((group + 1) * group_size, weight.shape[1]))
        tile = remaining[:, span].clone()
        diagonal = upper.diagonal()[span]
        scale, zero_point = choose(tile, tile.square() / diagonal.square(), width)
        scale = storable_scale(scale)
        zero_point = storable_zero_point(zero_point, torch.tensor(width, device=weight.device))
        scales.append(scale)
        zero_points.append(zero_point)
        if compensate:
            errors = _round_columns(tile, upper[span, span], scale, zero_point, 2**width - 1)
            remaining[:, span.stop :] -= errors @ upper[span, span.stop :]
        integers[:, span] = nearest_integers(tile, scale[:, None], zero_point[:, None], 2**width - 1).to(torch.uint8)
    return QuantizedWeight(integers, torch.stack(scales, 1), torch.stack(zero_points, 1), bits, group_size)


def _round_columns(tile: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> Tensor:
    """Round `tile` `[out, columns]` column by column, moving each error into the columns after it, in place.

    Returns the errors over the diagonal of `upper`, `[out, columns]`, for the groups that follow.
    """
    errors = torch.empty_like(tile)
    for column in range(tile.shape[1]):
        real = tile[:, column]
        level = (nearest_integers(real, scale, zero_point, largest) - zero_point) * scale
        errors[:, column] = (real - level) / upper[column, column]
        tile[:, column + 1 :].addr_(errors[:, column], upper[column, column + 1 :], alpha=-1)
    return errors
