"""A whole model's predictions, and those that it would make of other hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class _Reached(Exception):
    """Raised to leave a model's forward where its head would begin."""


@contextmanager
def stopped_at_head(model: PreTrainedModel, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Within this context a forward of the model calls `hook` with what the head would read, and ends the context."""

    def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
        hook(inputs[0])
        raise _Reached

    handle = _head(model).register_forward_pre_hook(stop)
    try:
        with suppress(_Reached):
            yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Prediction:
    """What a causal language model computes of tokens.

    Attributes:
        tokens: the tokens, `[windows, sequence_length]`.
        states: hidden states that the head reads, `[windows, sequence_length, hidden]`.
        logits: `[windows, sequence_length, vocabulary]`; models may scale or cap what the head gives.
        body: the part of the model that turns the tokens into hidden states.
        output: what that part returned.
    """

    tokens: Tensor
    states: Tensor
    logits: Tensor
    body: nn.Module
    output: Any


def predict(model: PreTrainedModel, tokens: Tensor) -> Prediction:
    """Return a model's prediction for tokens `[windows, sequence_length]`."""
    states: list[Tensor] = []
    outputs: list[tuple[nn.Module, Any]] = []
    # Some models call their base model, others its decoder alone; the outermost one of them returns last.
    bodies = {id(body): body for body in (model.base_model, model.get_decoder()) if body is not model}.values()
    with ExitStack() as stack:
        for body in bodies:
            hook = body.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
            stack.callback(hook.remove)
        head = _head(model).register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        stack.callback(head.remove)
        logits = model(input_ids=tokens, use_cache=False).logits
    return Prediction(tokens, states[-1], logits, *outputs[-1])


def logits_of(model: PreTrainedModel, states: Tensor, prediction: Prediction) -> Tensor:
    """Return the logits that a model makes of hidden states which its head reads.

    Args:
        model: the model.
        states: the hidden states, `[windows, sequence_length, hidden]`.
        prediction: any prediction of the model for as many tokens; the body does not run again.
    """
    head = _head(model)
    multiply = head.forward
    with (
        _forward(prediction.body, lambda *_, **__: prediction.output),
        _forward(head, lambda *_: multiply(states)),
    ):
        logits: Tensor = model(input_ids=prediction.tokens, use_cache=False).logits
    return logits


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert head is not None
    return head


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context a module computes another function."""
    before = vars(module).get("forward")  # None where the class's own counts
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
