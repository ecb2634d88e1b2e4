"""Quantization of one linear weight without training: round to nearest, GPTQ, or SliM-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight, tile_qparams, uniform_bits
from slimplus.quantization.gptq import RoundedWeight, quantize_weight
from slimplus.quantization.least_squares import refit_qparams
from slimplus.quantization.salience import InverseHessian, invert_hessian
from slimplus.quantization.salience_calibration import calibrate_group

Method = Literal["rtn", "gptq", "slimllm", "slimllm_plus", "qat"]
Search = Literal["slimllm", "uniform", "block"]

REFITS = 3  # rounds of least squares and rounding; the output error falls by 15-40 %, little of it after the third

VOCABULARY_ROWS = 16384  # rows quantized at a time, to bound memory


@dataclass(frozen=True)
class QuantizationConfig:
    """How a linear weight is quantized.

    Attributes:
        method: name of the method; `slimllm_plus` and `qat` start their training from the result of `slimllm`.
        bits: average width of the weights.
        group_size: columns a group.
        percdamp: damping of the Hessian, as a share of its mean diagonal.
        allocation: search for the widths of a block's groups, where they are not given.
        widths: widths that the allocation `block` chooses from.
        scale_bits: bits that a scale takes in the packed format, 8 or 16.
        integer_zero_points: whether zero points are integers, `0 … 2**bits - 1`, and not on the finer grid of the
            packed format.
        per_layer: whether the allocation `block` gives all groups of a layer one width.
        error_propagation: share of the error in a layer's inputs, left by the quantized layers before it, that its
            weights make up for (`slimplus.quantization.error_propagation`).
    """

    method: Method
    bits: int
    group_size: int
    percdamp: float = 0.01
    allocation: Search = "uniform"
    widths: tuple[int, ...] = (1, 2, 3, 4)
    scale_bits: int = 16
    integer_zero_points: bool = False
    per_layer: bool = False
    error_propagation: float = 0.0

    @property
    def calibrates(self) -> bool:
        """Whether scales and zero points are searched for and fitted; otherwise they span min-max ranges."""
        return self.method not in ("rtn", "gptq")


def round_weight(
    weight: Tensor, bits: Tensor, hessian: Tensor, inverse: InverseHessian, config: QuantizationConfig
) -> RoundedWeight:
    """Quantize one linear weight by the method of `config`.

    Round to nearest and GPTQ take min-max grids. SliM-LLM calibrates the grids (arXiv 2405.14917, section 3.3). Beyond
    the paper, a least-squares fit of scales and zero points to the output error follows each rounding, and the next
    rounding takes the fitted grid. In the fit, a column whose input is always zero counts as much as the damping does.

    Args:
        weight: the weight, `[out, in]`, float32.
        bits: width of each group, `[groups]`.
        hessian: Hessian of the layer's inputs, `[in, in]`.
        inverse: inverse of `hessian`.
        config: method and constants.
    """
    rounding = partial(
        quantize_weight,
        bits=bits,
        group_size=config.group_size,
        inverse=inverse,
        scale_bits=config.scale_bits,
        integer_zero_points=config.integer_zero_points,
    )
    if not config.calibrates:
        choose = partial(_minmax, integer_zero_points=config.integer_zero_points)
        return rounding(weight, choose=choose, compensate=config.method == "gptq")
    hessian = hessian + torch.diag(inverse.dead * config.percdamp * hessian.diagonal().mean())
    choose = partial(calibrate_group, integer_zero_points=config.integer_zero_points)
    rounded = rounding(weight, choose=choose, compensate=True)
    for round_ in range(REFITS):
        scale, zero_point = refit_qparams(weight, rounded.weight, hessian)
        if round_ < REFITS - 1:
            rounded = rounding(weight, choose=_FixedQParams(scale, zero_point), compensate=True)
    return replace(rounded, weight=replace(rounded.weight, scale=scale, zero_point=zero_point))


def quantize_embedding_or_head(weight: Tensor, hessian: Tensor | None, config: QuantizationConfig) -> QuantizedWeight:
    """Quantize the weight of an embedding or an output head, all groups to `config.bits`.

    Args:
        weight: the weight with a row for each token, `[vocabulary, hidden]`.
        hessian: Hessian of the head's inputs, `[hidden, hidden]`; None, for an embedding, minimises the error of the
            weight itself.
        config: method and constants.
    """
    hidden = weight.shape[1]
    bits = uniform_bits(hidden, config.group_size, config.bits)
    hessian = torch.eye(hidden, device=weight.device) if hessian is None else hessian
    inverse = invert_hessian(hessian, config.percdamp)
    parts = [
        round_weight(rows.float(), bits, hessian, inverse, config).weight for rows in weight.split(VOCABULARY_ROWS)
    ]
    integers, scale, zero_point = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("integers", "scale", "zero_point")
    )
    return replace(parts[0], integers=integers, scale=scale, zero_point=zero_point)


def _minmax(tile: Tensor, salience: Tensor, bits: int, integer_zero_points: bool = False) -> tuple[Tensor, Tensor]:
    """Choose the round-to-nearest grid of a group."""
    return tile_qparams(tile, bits, integer_zero_points)


class _FixedQParams:
    """A choice made beforehand: the scale and zero point of each group, in the order of the groups."""

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        self.pairs: Iterator[tuple[Tensor, Tensor]] = iter(zip(scale.T, zero_point.T, strict=True))

    def __call__(self, tile: Tensor, salience: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return next(self.pairs)
