"""Perplexity, one block on the device at a time, so that a model that fits no device can be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.progress import track

TOKENS_AT_A_TIME = 256  # the metric holds several copies of `tokens × vocabulary` probabilities


def perplexity(model: StreamedModel, tokens: Tensor, runner: BlockRunner, description: str) -> float:
    """Perplexity of `tokens` `[windows, sequence_length]`: each token but a window's first, given those before it."""
    inputs = model.block_inputs(tokens, runner)
    hidden = inputs.hidden
    for block, arguments in track(list(zip(model.blocks, inputs.arguments, strict=True)), description):
        hidden = runner.run(runner.load(block), hidden, arguments)
    # In float32 its softmax is 0 for a token 104 nats below the likeliest one, and the perplexity infinite.
    metric = Perplexity().to(runner.device).set_dtype(torch.float64)
    for window, output in zip(tokens.split(1), hidden.split(1), strict=True):
        logits, expected = model.logits(window, output, runner)[:, :-1], window[:, 1:].to(runner.device)
        for start in range(0, expected.shape[1], TOKENS_AT_A_TIME):
            span = slice(start, start + TOKENS_AT_A_TIME)
            metric.update(logits[:, span].double(), expected[:, span])
    return float(metric.compute())


def continue_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 24) -> str:
    """`prompt` and what `model` writes after it, greedily, on one line."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(str(tokenizer.decode(written[0], skip_special_tokens=True)).split())
