"""End-to-end training: grids and norms of the whole quantized model learn what the full-precision model predicts.

Blocks that are quantized one by one add up errors that no single block can see. This training keeps the integers and
lets grids and norms make up for the errors, like the second phase of EfficientQAT (arXiv 2407.11062), with distillation
in addition.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from slimplus.models.architectures import find_blocks, text_norms
from slimplus.models.precision import autocast
from slimplus.models.predictions import Prediction, logits_of, predict
from slimplus.nn import FakeQuantizedLinear
from slimplus.training.losses import normalized_error
from slimplus.training.module import QuantizerTraining, TrainingConfig
from slimplus.training.optimizers import ParameterKind, RateConfig
from slimplus.training.teacher import Teacher


@dataclass(frozen=True)
class EndToEndConfig(TrainingConfig):
    """Settings of the training of the whole model.

    Attributes:
        norms: learning rate of the norms' gains, in parts of a norm's mean gain.
        next_token: weight of the cross-entropy of the text's next token.
        distillation: weight of the KL divergence of the quantized model's predictions from the full-precision model's.
        hidden_states: weight of the normalized error of the last hidden states.
        activation_checkpointing: whether to keep the inputs of blocks only, and to compute the other activations a
            second time in the backward.
    """

    norms: RateConfig = field(default_factory=RateConfig)
    next_token: float = 0.0
    distillation: float = 1.0
    hidden_states: float = 0.0
    activation_checkpointing: bool = False


class EndToEnd(QuantizerTraining):
    """Training of the grids and the norms of a whole model.

    A batch is `(tokens,)` or `(tokens, states)`: the tokens, `[windows, sequence_length]`, and the hidden states that
    the full-precision model's head reads, `[windows, sequence_length, hidden]`.

    Args:
        model: the model, float32, the linear layers of its blocks fake-quantized.
        teacher: model that gives `states` if the batch has none.
        config: settings of the training.
        precision: Lightning's name of the precision to autocast to.
    """

    config: EndToEndConfig

    def __init__(self, model: PreTrainedModel, teacher: Teacher | None, config: EndToEndConfig, precision: str) -> None:
        super().__init__(config, precision)
        self.model = model.requires_grad_(False)
        self._teacher: tuple[Teacher | None] = (teacher,)  # hidden from PyTorch: not trained, moved or sharded
        for block in find_blocks(model):
            for module in block.modules():
                if isinstance(module, FakeQuantizedLinear):
                    for parameter in module.grid:
                        parameter.requires_grad_()
            if config.activation_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self._norms: list[tuple[float, nn.Module]] = []  # with their units, taken before a strategy shards the gains
        if config.norms.learning_rate != 0:
            for module in text_norms(model):
                if parameters := list(module.parameters(recurse=False)):
                    self._norms.append((_unit(parameters[0]), module))
                    for parameter in parameters:
                        parameter.requires_grad_()

    def evaluated_together(self, length: int) -> int:
        """Return 1: the predictions for several windows of `length` tokens might not fit the device."""
        return 1

    def kinds(self) -> list[ParameterKind]:
        """Return the grids' parameters and the norms' gains, the gains grouped by their size."""
        layers = [module for module in self.model.modules() if isinstance(module, FakeQuantizedLinear)]
        grid: list[Any] = [parameter for layer in layers for parameter in layer.grid]
        by_unit: dict[float, list[nn.Parameter]] = defaultdict(list)
        for unit, norm in self._norms:  # a strategy may have replaced their parameters since the last attempt
            by_unit[unit] += norm.parameters(recurse=False)
        norms = [ParameterKind(parameters, self.config.norms, unit=unit) for unit, parameters in by_unit.items()]
        return [ParameterKind(grid, self.config.grid), *norms]

    def forward(self, tokens: Tensor) -> Prediction:
        """Return the model's prediction for tokens `[windows, sequence_length]`."""
        with autocast(self.device, self.precision_name):
            return predict(self.model, tokens)

    def _taught(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        """Return the hidden states that the full-precision model's head reads, from the batch or the teacher."""
        (teacher,) = self._teacher
        if states:
            return states[0].float()
        assert teacher is not None
        return teacher(tokens).float()

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted sum of the losses, each a mean over the tokens of a batch."""
        tokens, *given = batch
        prediction = self(tokens)
        predicted = prediction.logits.float().log_softmax(-1)
        config, total = self.config, predicted.new_zeros(())
        if config.next_token:
            expected = tokens[:, 1:].flatten()
            total = total + config.next_token * nn.functional.nll_loss(predicted[:, :-1].flatten(0, 1), expected)
        if not (config.distillation or config.hidden_states):
            return total
        with torch.no_grad():
            taught = self._taught(tokens, given)
        if config.distillation:
            with torch.no_grad(), autocast(self.device, self.precision_name):
                logits = logits_of(self.model, taught, prediction)
            wanted = logits.float().log_softmax(-1)
            divergence = nn.functional.kl_div(predicted, wanted, reduction="sum", log_target=True)
            total = total + config.distillation * divergence / tokens.numel()
        if config.hidden_states:
            total = total + config.hidden_states * normalized_error(prediction.states, taught)
        return total


def _unit(gain: Tensor) -> float:
    """Return the mean of a norm's gains, rounded to a power of two.

    Adam's steps are as large as the learning rate, while gains may be 0.02 in one norm of a model and 2 in another: the
    rate is a part of this unit. The rounding lets norms of about the same size share one group of the optimizer.
    """
    mean = float(gain.detach().abs().mean())
    return float(2.0 ** round(math.log2(mean))) if mean else 1.0
