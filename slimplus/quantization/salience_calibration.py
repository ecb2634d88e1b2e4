"""Salience-weighted quantizer calibration (SQC): the scale and zero point of each group.

SliM-LLM, arXiv 2405.14917, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimplus.format.affine import binary_qparams, minmax_qparams, nearest_integers

GPU_ELEMENTS = 2**24


@dataclass(frozen=True)
class CalibrationConfig:
    """Constants of the search.

    Attributes:
        steps: how many wider and how many narrower ranges are tried.
        reach: the widest range is `1 + reach` times the min-max range, the narrowest `1 - reach`.
        exponent: power of the error that is summed.
        salient_weight: λ, the weight of the salient elements' error.
        salient_deviations: an element is salient above this many standard deviations of its tile's salience.
    """

    steps: int = 50
    reach: float = 0.1
    exponent: float = 2.4
    salient_weight: float = 1.0
    salient_deviations: float = 2.0


def calibrate_group(
    tile: Tensor, salience: Tensor, bits: int, config: CalibrationConfig = CalibrationConfig()
) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[out]` of one group.

    Args:
        tile: the group's weights, `[out, columns]`.
        salience: `δ` of the same elements, `[out, columns]`.
        bits: width of the group.
        config: constants of the search.
    """
    if bits == 1:
        return binary_qparams(tile)
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
    """How many to try together: a CPU is fastest in its cache, a GPU waits for its next kernel with few elements."""
    return max(GPU_ELEMENTS // tile.numel(), 1) if tile.is_cuda else 1
