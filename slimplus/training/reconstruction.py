"""One transformer block as a LightningModule: its quantizers learn to reproduce the full-precision block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimplus.models.precision import autocast
from slimplus.models.streaming import BlockArguments, run_block
from slimplus.nn import FakeQuantizedLinear
from slimplus.nn.fake_quantized import LARGEST_OFFSET
from slimplus.training.losses import LossConfig, reconstruction_loss
from slimplus.training.module import QuantizerTraining, TrainingConfig
from slimplus.training.optimizers import ParameterKind, RateConfig


@dataclass(frozen=True)
class ReconstructionConfig(TrainingConfig):
    """How a block's quantizers are trained.

    Attributes:
        per_weight: rate of what each weight has of its own: the offset of its rounding, or itself.
        loss: what is minimised.
    """

    per_weight: RateConfig = field(default_factory=RateConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class LossContext:
    """What a loss asks of a block's place in the model.

    Attributes:
        norm: the normalization that follows the block.
        channels: `[hidden]`, salience of the block's output channels, if it was measured.
    """

    norm: Callable[[Tensor], Tensor] | None = None
    channels: Tensor | None = None


class BlockReconstruction(QuantizerTraining):
    """Trains every parameter of `block` that requires a gradient on the error of its output.

    A batch is `(hidden, target)` or `(hidden, target, auxiliary)`, all `[windows, sequence_length, hidden]`: the output
    of the quantized blocks before this one, the full-precision block's output along the full-precision chain, and, for
    the auxiliary loss, its output along the quantized chain.

    Args:
        block: the block, its linear layers fake-quantized.
        arguments: the block's other arguments, on its device.
        config: epochs, rates, loss.
        precision: Lightning's name of the precision to autocast to.
        context: what the loss needs to know.
    """

    config: ReconstructionConfig

    def __init__(
        self,
        block: nn.Module,
        arguments: BlockArguments,
        config: ReconstructionConfig,
        precision: str,
        context: LossContext = LossContext(),
    ) -> None:
        super().__init__(config, precision)
        self.block, self.arguments = block, arguments
        # In a tuple, so that the norm does not become a part of this module.
        self._surroundings: tuple[LossContext] = (context,)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[windows, sequence_length, hidden]` → the same."""
        with autocast(self.device, self.precision_name):
            return run_block(self.block, hidden.float(), self.arguments)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        hidden, target, *auxiliary = batch
        output, config = self(hidden), self.config.loss
        (around,) = self._surroundings
        channels = around.channels if config.salient_channels else None
        error = reconstruction_loss(output, target, config, around.norm, channels)
        for other in auxiliary:
            error = error + config.auxiliary * reconstruction_loss(output, other, config, around.norm, channels)
        return error

    def kinds(self) -> list[ParameterKind]:
        layers = [module for module in self.block.modules() if isinstance(module, FakeQuantizedLinear)]
        grid: list[Any] = [parameter for layer in layers for parameter in layer.grid]
        per_weight: list[Any] = [parameter for layer in layers for parameter in layer.per_weight]
        bound = max((layer.bound for layer in layers), default=LARGEST_OFFSET)
        return [ParameterKind(per_weight, self.config.per_weight, bound), ParameterKind(grid, self.config.grid)]
