"""Salience-weighted quantizer calibration (SQC): the scale and zero point of each group.

SliM-LLM, arXiv 2405.14917, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimplus.format.affine import nearest_integers, range_qparams, tile_qparams, tile_range

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
    low, high = tile_range(tile)
    scale, zero_point = range_qparams(low * shrinks[:, None], high * shrinks[:, None], bits)  # [ranges, out]
    together = _ranges_at_once(tile)
    # Fresh memory for each range would cost a CPU more than the arithmetic.
    buffer = None if tile.is_cuda else torch.empty_like(tile.expand(together, *tile.shape))
    totals = []
    for grids in zip(scale[..., None].split(together), zero_point[..., None].split(together), strict=True):
        out = None if buffer is None else buffer[: len(grids[0])]
        error = _rounding_error(tile, *grids, 2**bits - 1, config.exponent, out)
        totals.append((error if weights is None else error * weights).sum(dim=-1))
    best = torch.cat(totals).argmin(dim=0, keepdim=True)
    return scale.gather(0, best)[0], zero_point.gather(0, best)[0]


def _rounding_error(
    tile: Tensor, scale: Tensor, zero_point: Tensor, largest: int, exponent: float, out: Tensor | None
) -> Tensor:
    """Return the magnitudes of the errors of rounding a tile to each of some grids, to a power.

    The power is taken by a logarithm, which a CPU computes for many values at once, as it does not `pow`.

    Args:
        tile: the weights, `[out, columns]`.
        scale: scales of the grids, `[grids, out, 1]`.
        zero_point: zero points of the grids, `[grids, out, 1]`.
        largest: largest integer of the grids.
        exponent: the power.
        out: tensor `[grids, out, columns]` that takes the result.
    """
    level = nearest_integers(tile, scale, zero_point, largest, out).sub_(zero_point).mul_(scale)
    return level.sub_(tile).abs_().log_().mul_(exponent).exp_()


def _ranges_at_once(tile: Tensor) -> int:
    """Return the number of ranges to try together: one on a CPU, for its cache; many on a GPU, for fewer launches."""
    return max(GPU_VALUES // tile.numel(), 1) if tile.is_cuda else 1
