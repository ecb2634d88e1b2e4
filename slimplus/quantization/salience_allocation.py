"""Salience-determined bit allocation (SBA): which groups of a linear get one bit less, and which one more.

SliM-LLM, arXiv 2405.14917, section 3.2. The mean stays exactly at the target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimplus.format.affine import choose_qparams, dequantize, quantize, uniform_bits

SMALLEST_PROBABILITY = 1e-6


def full_groups(in_features: int, group_size: int) -> int:
    """Groups that may change width: a shorter last group keeps the target, else the average per weight would drift."""
    return in_features // group_size


def largest_pair_count(in_features: int, group_size: int) -> int:
    """Largest number of (minus one bit, plus one bit) pairs the search tries."""
    return max(full_groups(in_features, group_size) // 2 - 1, 0)


def _ranked(salience: Tensor, in_features: int, group_size: int) -> Tensor:
    return torch.argsort(salience[: full_groups(in_features, group_size)], stable=True).cpu()


def paired_bits(salience: Tensor, pairs: int, target_bits: int, in_features: int, group_size: int) -> Tensor:
    """`[groups]`: the `pairs` least salient groups get one bit less, the `pairs` most salient one more."""
    bits = uniform_bits(in_features, group_size, target_bits)
    order = _ranked(salience, in_features, group_size)
    bits[order[:pairs]] -= 1
    bits[order[len(order) - pairs :]] += 1
    return bits


def log_probabilities(outputs: Tensor) -> Tensor:
    """Log-softmax over the last dimension, of probabilities clamped at 1e-6 as the reference does."""
    return outputs.log_softmax(dim=-1).clamp_(min=math.log(SMALLEST_PROBABILITY))


class AllocationSearch:
    """KL of a layer's output for 0, 1, 2, … pairs, summed over all the tokens it is shown.

    KL(q‖p) lies between the softmax of the quantized (q, round to nearest) and of the full outputs (p).

    Args:
        weight: `[out, in]`.
        salience: `[groups]`.
        target_bits: 2 to 7.
        group_size: columns a group.

    Attributes:
        divergence: `[largest_pair_count + 1]`, float64. A sum, so that ranks may add theirs up.
    """

    def __init__(self, weight: Tensor, salience: Tensor, target_bits: int, group_size: int) -> None:
        self.weight, self.target_bits, self.group_size = weight, target_bits, group_size
        self.order = _ranked(salience, weight.shape[1], group_size).tolist()
        self.divergence = torch.zeros(
            largest_pair_count(weight.shape[1], group_size) + 1, dtype=torch.float64, device=weight.device
        )
        self.grids = {
            width: _round_to_nearest(weight, torch.full(salience.shape, width, dtype=torch.int32), group_size)
            for width in (target_bits - 1, target_bits, target_bits + 1)
        }

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of `inputs` `[..., in]`."""
        with torch.autocast(inputs.device.type, enabled=False):
            batch = inputs.reshape(-1, inputs.shape[-1]).to(self.weight.dtype)
            full = log_probabilities(batch @ self.weight.T)
            output = batch @ self.grids[self.target_bits].T
            for pairs in range(len(self.divergence)):
                if pairs:
                    self._move_pair(output, batch, pairs)
                quantized = log_probabilities(output)
                self.divergence[pairs] += (quantized.exp() * (quantized - full)).sum(dtype=torch.float64)

    def _move_pair(self, output: Tensor, batch: Tensor, pairs: int) -> None:
        """One more pair changes two groups only: update their share of the output instead of recomputing it."""
        base = self.grids[self.target_bits]
        for group, width in (
            (self.order[pairs - 1], self.target_bits - 1),
            (self.order[-pairs], self.target_bits + 1),
        ):
            span = slice(group * self.group_size, (group + 1) * self.group_size)
            output.addmm_(batch[:, span], (self.grids[width][:, span] - base[:, span]).T)


def _round_to_nearest(weight: Tensor, bits: Tensor, group_size: int) -> Tensor:
    scale, zero_point = choose_qparams(weight, bits, group_size)
    return dequantize(quantize(weight, scale, zero_point, bits, group_size), scale, zero_point, group_size)
