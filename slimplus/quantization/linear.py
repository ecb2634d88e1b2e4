"""One linear weight quantized without training: round to nearest, GPTQ, or SliM-LLM."""

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

VOCABULARY_ROWS = 16384  # quantized at a time, to bound memory


@dataclass(frozen=True)
class QuantizationConfig:
    """How a linear weight is quantized.

    Attributes:
        method: `slimllm_plus` and `qat` start training from what `slimllm` gives.
        bits: average width.
        group_size: columns a group.
        percdamp: damping of the Hessian, as a share of its mean diagonal.
        allocation: how the widths of a block's groups are found where they are not given.
        widths: those that the allocation `block` chooses from.
        scale_bits: 8 or 16, those that a scale takes in the packed format.
    """

    method: Method
    bits: int
    group_size: int
    percdamp: float = 0.01
    allocation: Search = "uniform"
    widths: tuple[int, ...] = (1, 2, 3, 4)
    scale_bits: int = 16

    @property
    def calibrates(self) -> bool:
        """Whether scales and zero points are searched for and fitted, rather than those of min-max ranges."""
        return self.method not in ("rtn", "gptq")


def quantize_linear(
    weight: Tensor, bits: Tensor, hessian: Tensor, inverse: InverseHessian, config: QuantizationConfig
) -> RoundedWeight:
    """Quantize `weight` `[out, in]`, its groups to `bits` `[groups]`.

    SliM-LLM's calibration and error compensation alternate with a least-squares fit of scales and zero points to the
    output error, which the paper does not have: rounding that knows the grid, then the grid that suits the rounding.

    Args:
        weight: float32.
        bits: `[groups]`.
        hessian: `[in, in]`, of the layer's inputs.
        inverse: of `hessian`.
        config: method and constants.
    """
    rounding = partial(
        quantize_weight, bits=bits, group_size=config.group_size, inverse=inverse, scale_bits=config.scale_bits
    )
    if not config.calibrates:
        return rounding(weight, choose=_minmax, compensate=config.method == "gptq")
    weight = weight.masked_fill(inverse.dead, 0)
    rounded = rounding(weight, choose=calibrate_group, compensate=True)
    for round_ in range(REFITS):
        scale, zero_point = refit_qparams(weight, rounded.weight, hessian)
        if round_ < REFITS - 1:
            given = _Given(scale, zero_point)
            rounded = rounding(weight, choose=given, compensate=True)
    return replace(rounded, weight=replace(rounded.weight, scale=scale, zero_point=zero_point))


def quantize_embedding_or_head(weight: Tensor, hessian: Tensor | None, config: QuantizationConfig) -> QuantizedWeight:
    """Quantize a weight with a row for each token, an embedding or an output head, all of it to `config.bits`.

    Args:
        weight: `[vocabulary, hidden]`.
        hessian: `[hidden, hidden]`, of the head's inputs; None, as for a lookup, makes the error of the weight count.
        config: method and constants.
    """
    hidden = weight.shape[1]
    bits = uniform_bits(hidden, config.group_size, config.bits)
    hessian = torch.eye(hidden, device=weight.device) if hessian is None else hessian
    inverse = invert_hessian(hessian, config.percdamp)
    parts = [
        quantize_linear(rows.float(), bits, hessian, inverse, config).weight for rows in weight.split(VOCABULARY_ROWS)
    ]
    integers, scale, zero_point = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("integers", "scale", "zero_point")
    )
    return replace(parts[0], integers=integers, scale=scale, zero_point=zero_point)


def _minmax(tile: Tensor, salience: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return tile_qparams(tile, bits)


class _Given:
    """Hands out scales and zero points that are already chosen, group after group."""

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        self.pairs: Iterator[tuple[Tensor, Tensor]] = iter(zip(scale.T, zero_point.T, strict=True))

    def __call__(self, tile: Tensor, salience: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return next(self.pairs)
