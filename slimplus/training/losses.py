"""What a trained block is judged by: the error of its output against the full-precision block's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

SMALLEST_ENERGY = 1e-6

Norm = Callable[[Tensor], Tensor]
"""The normalization that follows a block: `[..., hidden]` → the same."""


@dataclass(frozen=True)
class LossConfig:
    """Choices that go together in any way.

    Attributes:
        error: `mse` is the mean squared error; `normalized` divides the squared error of each token by the token's
            energy, so that the few tokens whose activations are thousands of times larger than the others' ("Massive
            Activations in Large Language Models", arXiv 2402.17762) do not rule it; `after_norm` is the same behind
            the normalization that follows, which is what the next block reads.
        trim_fraction: share of each window's tokens, those with the largest errors, that do not count.
        salient_channels: weight the channels of the output by their salience for what reads them.
        auxiliary: weight of a second error, against the full-precision block fed the quantized input (`aug_loss` of
            SliM-LLM+, arXiv 2405.14917).
    """

    error: Literal["mse", "normalized", "after_norm"] = "normalized"
    trim_fraction: float = 0.0
    salient_channels: bool = False
    auxiliary: float = 0.0


def reconstruction_loss(
    output: Tensor, target: Tensor, config: LossConfig, norm: Norm | None = None, channels: Tensor | None = None
) -> Tensor:
    """Mean over the tokens of an error between `output` and `target`, both `[..., hidden]`.

    Args:
        output: of the quantized block.
        target: of the full-precision one.
        config: which error; `auxiliary` is the caller's, who has a second target.
        norm: what follows the block, for `after_norm`.
        channels: `[hidden]`, weight of each channel's squared error, for `salient_channels`.
    """
    output, target = output.float(), target.float()
    if config.error == "after_norm" and norm is not None:
        output, target = norm(output), norm(target)
    weights = 1.0 if channels is None else channels
    errors = ((output - target).square() * weights).sum(-1)
    if config.error == "mse":
        errors = errors / output.shape[-1]
    else:
        errors = errors / (target.square() * weights).sum(-1).clamp(min=SMALLEST_ENERGY)
    if config.trim_fraction:
        tokens = errors.shape[-1]  # of a window, so that it does not matter how many are looked at together
        errors = errors.topk(tokens - int(config.trim_fraction * tokens), largest=False).values
    return errors.mean()


def normalized_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of `|output - target|² / |target|²`; both `[..., hidden]`."""
    return reconstruction_loss(output, target, LossConfig())
