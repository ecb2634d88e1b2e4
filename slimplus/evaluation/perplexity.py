"""Perplexity, with one block on the device at a time, so that models larger than the device can be measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.text import Perplexity

from slimplus.models.precision import overflow_remedy
from slimplus.models.streaming import StreamedModel
from slimplus.utils.errors import InputError

TOKENS_AT_A_TIME = 256  # bounds memory: the metric holds several copies of `tokens × vocabulary` probabilities


def perplexity(model: StreamedModel, tokens: Tensor, description: str) -> float:
    """Return the perplexity of a model on windows, for each token but a window's first, given those before it.

    Args:
        model: the model, run one block at a time.
        tokens: this rank's windows, `[windows, sequence_length]`; the metric adds up the sums of all ranks.
        description: text of the progress bar.

    Raises:
        InputError: if the perplexity is NaN or infinite.
    """
    hidden = model.last_hidden(model.block_inputs(tokens), description)
    device = model.runner.device
    # A float32 softmax is 0 for tokens 104 nats below the likeliest one, which would make the perplexity infinite.
    metric = Perplexity().to(device).set_dtype(torch.float64)
    for window, output in zip(tokens.split(1), hidden.split(1), strict=True):
        logits, expected = model.logits(window, output)[:, :-1], window[:, 1:].to(device)
        for start in range(0, expected.shape[1], TOKENS_AT_A_TIME):
            span = slice(start, start + TOKENS_AT_A_TIME)
            metric.update(logits[:, span].double(), expected[:, span])
    measured = float(metric.compute())
    if not math.isfinite(measured):
        raise InputError(
            f"perplexity, {description}: it is {measured}, so the model's activations or its output overflowed; "
            f"{overflow_remedy(model.runner.precision)}; what is finished is kept"
        )
    return measured
