"""Reconstruction losses: the error of a quantized block's output against the full-precision block's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST_ENERGY = 1e-6
LARGEST_GAIN = 4.0
"""Energy of an output, in parts of its target's, beyond which the output's own energy bounds the normalized error.

SmolLM2's block 11 gives one token in 250 an energy 40,000 times the others'. Where a quantized block gives it to one
more token, that token's error, in parts of its target's energy, would outweigh those of 100,000 others.
"""

Norm = Callable[[Tensor], Tensor]
"""The normalization that follows a block, from `[..., hidden]` to the same shape."""


@dataclass(frozen=True)
class LossConfig:
    """Choices of the reconstruction loss, each independent of the others.

    Attributes:
        error: `mse` is the mean squared error. `normalized` divides each token's squared error by the token's energy:
            the activations of a few tokens are thousands of times larger than the others ("Massive Activations in Large
            Language Models", arXiv 2402.17762), and would dominate the sum. `after_norm` is the normalized error of
            what the next block reads, the output of the normalization that follows.
        trim_fraction: share of each window's tokens, those with the largest errors, that does not count.
        salient_channels: whether to weight the output channels by their salience for the layers that read them.
        auxiliary: weight of a second error, against the full-precision block's output for the quantized block's input
            (`aug_loss` of SliM-LLM+, arXiv 2405.14917).
    """

    error: Literal["mse", "normalized", "after_norm"] = "normalized"
    trim_fraction: float = 0.0
    salient_channels: bool = False
    auxiliary: float = 0.0


def reconstruction_loss(
    output: Tensor, target: Tensor, config: LossConfig, norm: Norm | None = None, channels: Tensor | None = None
) -> Tensor:
    """Return the mean over the tokens of the error between two outputs.

    Args:
        output: output of the quantized block, `[..., hidden]`.
        target: output of the full-precision block, `[..., hidden]`.
        config: choice of the error; `auxiliary` is left to the caller, who has the second target.
        norm: the normalization that follows the block, for `after_norm`.
        channels: weight of each channel's squared error, `[hidden]`, for `salient_channels`.
    """
    output, target = output.float(), target.float()
    if config.error == "after_norm" and norm is not None:
        output, target = norm(output), norm(target)
    weights = 1.0 if channels is None else channels
    errors = ((output - target).square() * weights).sum(-1)
    if config.error == "mse":
        errors = errors / output.shape[-1]
    else:
        energy, own_energy = ((tensor.square() * weights).sum(-1) for tensor in (target, output.detach()))
        errors = errors / torch.maximum(energy, own_energy / LARGEST_GAIN).clamp(min=SMALLEST_ENERGY)
    if config.trim_fraction:
        tokens = errors.shape[-1]  # of each window: the loss must not depend on the windows in a batch
        errors = errors.topk(tokens - int(config.trim_fraction * tokens), largest=False).values
    return errors.mean()


def normalized_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of `|output - target|² / |target|²` for two tensors `[..., hidden]`.

    A token's error is bounded as `LARGEST_GAIN` says.
    """
    return reconstruction_loss(output, target, LossConfig())
