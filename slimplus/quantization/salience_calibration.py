"""Salience-weighted quantizer calibration (SQC): the scale and zero point of each group.

SliM-LLM, arXiv 2405.14917, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimplus.format.affine import minmax_qparams, nearest_integers, tile_qparams

GPU_VALUES = 2**24  # tried together on a GPU: enough to keep it busy, few enough for its memory


@dataclass(frozen=True)
class CalibrationConfig:
    """Constants of the search for a group's range.

    Attributes:
        steps: number of wider ranges, and of narrower ones, that are tried.
        reach: span of the search: from `1 - reach` to `1 + reach` times the min-max range.
        exponent: power of the errors that are summed.
        salient_weight: factor λ on the errors of salient weights.
        salient_deviations: standard deviations by which a salient weight's salience exceeds the mean of its group.
    """

    steps: int = 50
    reach: float = 0.1
    exponent: float = 2.4
    salient_weight: float = 1.0
    salient_deviations: float = 2.0


def calibrate_group(
    tile: Tensor,
    salience: Tensor,
    bits: int,
    config: CalibrationConfig = CalibrationConfig(),
    integer_zero_points: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point `[out]` of one group, those of the range with the smallest error in each row.

    A 1-bit group gets the levels `mean(w) ± mean|w|` without a search, or 0 and another one if its zero point is to be
    an integer; those of wider groups are integers anyway.

    Args:
        tile: the group's weights, `[out, columns]`.
        salience: salience `δ` of the same weights, `[out, columns]`.
        bits: width of the group.
        config: constants of the search.
        integer_zero_points: whether the zero point must be an integer.
    """
    if bits == 1:
        return tile_qparams(tile, bits, integer_zero_points)
    salient = salience > salience.mean() + config.salient_deviations * salience.std()
    weights = torch.where(salient, config.salient_weight, 1.0) if config.salient_weight != 1 else None
    offsets = config.reach * torch.arange(1, config.steps + 1, device=tile.device) / config.steps
    shrinks = torch.cat([offsets.new_ones(1), 1 + offsets, 1 - offsets])
    best_error = torch.full_like(tile[:, 0], torch.inf)
    best_scale, best_zero = torch.empty_like(best_error), torch.empty_like(best_error)
    for part in shrinks.split(_ranges_at_once(tile)):
        scale, zero_point = minmax_qparams(tile, bits, part[:, None])  # [ranges, out]
        level = nearest_integers(tile, scale[..., None], zero_point[..., None], 2**bits - 1)
        error = level.sub_(zero_point[..., None]).mul_(scale[..., None]).sub_(tile).abs_().pow_(config.exponent)
        total, place = (error if weights is None else error * weights).sum(dim=-1).min(dim=0, keepdim=True)
        better = total[0] < best_error
        best_error = torch.where(better, total[0], best_error)
        best_scale = torch.where(better, scale.gather(0, place)[0], best_scale)
        best_zero = torch.where(better, zero_point.gather(0, place)[0], best_zero)
    return best_scale, best_zero


def _ranges_at_once(tile: Tensor) -> int:
    """Return the number of ranges to try together: one on a CPU, for its cache; many on a GPU, for fewer launches."""
    return max(GPU_VALUES // tile.numel(), 1) if tile.is_cuda else 1
