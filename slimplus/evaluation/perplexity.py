"""Perplexity, with one block on the device at a time, so that models larger than the device can be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torchmetrics.text import Perplexity

from slimplus.models.precision import overflow_remedy
from slimplus.models.streaming import ReplaceBlock, StreamedModel
from slimplus.utils.errors import InputError
from slimplus.utils.progress import Track, untracked

TOKENS_AT_A_TIME = 256  # bounds memory: the metric holds several copies of `tokens × vocabulary` probabilities
LEFT_OUT = -100  # stands for a token whose prediction does not count

Observe = Callable[[Tensor], None]
"""Function that sees the logits `[predictions, vocabulary]` which a perplexity is computed from, in order."""


def perplexity(
    model: StreamedModel,
    tokens: Tensor,
    description: str,
    observe: Observe | None = None,
    track: Track = untracked,
    counted: Tensor | None = None,
    replace: ReplaceBlock | None = None,
) -> float:
    """Return the perplexity of a model on windows, for each token but a window's first, given those before it.

    Args:
        model: the model, run one block at a time.
        tokens: this rank's windows, `[windows, sequence_length]`; the metric adds up the sums of all ranks.
        description: what is measured, for messages.
        observe: function that sees the logits as well.
        track: iterates over the blocks.
        counted: which predictions count, `[windows, sequence_length - 1]`, bool; None counts all.
        replace: returns the block to run in the place of each block.

    Raises:
        InputError: if the perplexity is NaN or infinite.
    """
    logits = _streamed_logits(model, tokens, track, replace)
    measured = perplexity_of_logits(logits, tokens, model.runner.device, observe, counted)
    if not math.isfinite(measured):
        raise InputError(
            f"perplexity, {description}: it is {measured}, so the model's activations or its output overflowed; "
            f"{overflow_remedy(model.runner.precision)}; what is finished is kept"
        )
    return measured


def _streamed_logits(
    model: StreamedModel, tokens: Tensor, track: Track, replace: ReplaceBlock | None
) -> Iterator[Tensor]:
    """Yield the logits of one window after the other."""
    hidden = model.last_hidden(model.block_inputs(tokens), track, replace)
    for window, output in zip(tokens.split(1), hidden.split(1), strict=True):
        yield model.logits(window, output)


def perplexity_of_logits(
    logits: Iterable[Tensor],
    tokens: Tensor,
    device: torch.device,
    observe: Observe | None = None,
    counted: Tensor | None = None,
) -> float:
    """Return the perplexity on windows of a model whose logits are given.

    Args:
        logits: the logits of one window after the other, `[1, sequence_length, vocabulary]`, on `device`.
        tokens: the windows, `[windows, sequence_length]`.
        device: where to compute.
        observe: function that sees the logits as well, also where they do not count.
        counted: which predictions count, `[windows, sequence_length - 1]`, bool; None counts all.

    Returns:
        The perplexity; NaN or infinity if logits are.
    """
    # A float32 softmax is 0 for tokens 104 nats below the likeliest one, which would make the perplexity infinite.
    metric = Perplexity(ignore_index=LEFT_OUT).to(device).set_dtype(torch.float64)
    targets = tokens[:, 1:] if counted is None else tokens[:, 1:].masked_fill(~counted, LEFT_OUT)
    for target, whole in zip(targets.split(1), logits, strict=True):
        expected = target.to(device)
        for start in range(0, expected.shape[1], TOKENS_AT_A_TIME):
            span = slice(start, min(start + TOKENS_AT_A_TIME, expected.shape[1]))
            metric.update(whole[:, span].double(), expected[:, span])
            if observe is not None:
                observe(whole[0, span])
    return float(metric.compute())
