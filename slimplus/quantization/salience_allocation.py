"""Salience-determined bit allocation (SBA): which groups of a linear get one bit less, and which one more.

SliM-LLM, arXiv 2405.14917, section 3.2. The mean stays exactly at the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from slimplus.format.affine import choose_qparams, dequantize, quantize, uniform_bits

SMALLEST_PROBABILITY = 1e-6
SEARCH_TOKENS = 8192  # the search compares few candidates: more tokens cost time and change nothing


def full_groups(in_features: int, group_size: int) -> int:
    """Return the number of groups that may change width.

    A shorter last group keeps the target width: changing it would shift the average over the weights.
    """
    return in_features // group_size


def largest_pair_count(in_features: int, group_size: int) -> int:
    """Return the largest number of pairs (one group a bit less, another a bit more) that the search tries."""
    return max(full_groups(in_features, group_size) // 2 - 1, 0)


def _ranked(salience: Tensor, in_features: int, group_size: int) -> Tensor:
    """Return the groups that may change width, from the least salient to the most salient one."""
    return torch.argsort(salience[: full_groups(in_features, group_size)], stable=True).cpu()


def paired_bits(salience: Tensor, pairs: int, target_bits: int, in_features: int, group_size: int) -> Tensor:
    """Return widths `[groups]`: one bit less for the `pairs` least salient groups, one more for the most salient.

    Args:
        salience: salience of each group, `[groups]`.
        pairs: number of groups that lose a bit, and of those that gain one.
        target_bits: width of all other groups.
        in_features: columns of the weight.
        group_size: columns a group.
    """
    bits = uniform_bits(in_features, group_size, target_bits)
    order = _ranked(salience, in_features, group_size)
    bits[order[:pairs]] -= 1
    bits[order[len(order) - pairs :]] += 1
    return bits


def log_probabilities(outputs: Tensor) -> Tensor:
    """Return the log-softmax over the last dimension; probabilities are at least 1e-6, as in the reference code."""
    return outputs.log_softmax(dim=-1).clamp_(min=math.log(SMALLEST_PROBABILITY))


class AllocationSearch:
    """Divergence of a layer's outputs for 0, 1, 2, … pairs, summed over the tokens that it is given.

    The divergence is KL(q‖p) between the softmax of the quantized outputs (q, rounded to nearest) and the softmax of
    the full-precision outputs (p).

    Args:
        weight: the weight, `[out, in]`.
        salience: salience of each group, `[groups]`.
        target_bits: average width, 2 to 7.
        group_size: columns a group.
        integer_zero_points: whether zero points must be integers.

    Attributes:
        divergence: divergence for each number of pairs, `[largest_pair_count + 1]`, float64; the sums of several ranks
            can be added.
    """

    def __init__(
        self,
        weight: Tensor,
        salience: Tensor,
        target_bits: int,
        group_size: int,
        integer_zero_points: bool = False,
    ) -> None:
        self.weight, self.target_bits, self.group_size = weight, target_bits, group_size
        self.order = _ranked(salience, weight.shape[1], group_size).tolist()
        self.divergence = torch.zeros(
            largest_pair_count(weight.shape[1], group_size) + 1, dtype=torch.float64, device=weight.device
        )
        self.grids = {
            width: _round_to_nearest(
                weight, torch.full(salience.shape, width, dtype=torch.int32), group_size, integer_zero_points
            )
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
        """Update `output` for one more pair: only two groups change, so their part is exchanged."""
        base = self.grids[self.target_bits]
        for group, width in (
            (self.order[pairs - 1], self.target_bits - 1),
            (self.order[-pairs], self.target_bits + 1),
        ):
            span = slice(group * self.group_size, (group + 1) * self.group_size)
            output.addmm_(batch[:, span], (self.grids[width][:, span] - base[:, span]).T)


def allocate_bits(
    weight: Tensor, salience: Tensor, inputs: Iterable[Tensor], target_bits: int, group_size: int
) -> Tensor:
    """Return the widths `[groups]` of a linear weight, of which the average is `target_bits`.

    As many groups lose a bit as gain one; how many is what diverges least from the full-precision outputs.

    Args:
        weight: the weight, `[out, in]`, float32.
        salience: salience of each group, `[groups]`, such as `group_salience` gives.
        inputs: batches of the layer's inputs, `[..., in]`; a few thousand tokens suffice.
        target_bits: average width, 2 to 7.
        group_size: columns a group.
    """
    search = AllocationSearch(weight, salience, target_bits, group_size)
    for batch in inputs:
        search.add(batch)
    return paired_bits(salience, int(search.divergence.argmin()), target_bits, weight.shape[1], group_size)


def _round_to_nearest(weight: Tensor, bits: Tensor, group_size: int, integer_zero_points: bool) -> Tensor:
    """Return the weight `[out, in]` rounded to the nearest levels of groups with `bits` `[groups]`."""
    scale, zero_point = choose_qparams(weight, bits, group_size, integer_zero_points)
    return dequantize(quantize(weight, scale, zero_point, bits, group_size), scale, zero_point, group_size)
