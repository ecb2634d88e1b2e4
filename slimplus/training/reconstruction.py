"""Block reconstruction: training of a block's quantizers to reproduce the output of the full-precision block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimplus.models.block_arguments import BlockArguments, BlockCall, Windows, call_block, run_block
from slimplus.models.precision import autocast
from slimplus.nn import FakeQuantizedLinear
from slimplus.nn.fake_quantized import LARGEST_OFFSET
from slimplus.training.losses import LossConfig, reconstruction_loss
from slimplus.training.module import QuantizerTraining, TrainingConfig
from slimplus.training.optimizers import ParameterKind, RateConfig


@dataclass(frozen=True)
class ReconstructionConfig(TrainingConfig):
    """Settings of the training of a block's quantizers.

    Attributes:
        per_weight: learning rate of the parameters that each weight has of its own: the offset of its rounding, or the
            weight itself.
        loss: the loss.
    """

    per_weight: RateConfig = field(default_factory=RateConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class LossContext:
    """Facts of a block's place in the model that its loss depends on.

    Attributes:
        norm: the normalization that follows the block, for the error `after_norm`.
        channels: salience of the block's output channels, `[hidden]`, if it was measured.
    """

    norm: Callable[[Tensor], Tensor] | None = None
    channels: Tensor | None = None


class BlockReconstruction(QuantizerTraining):
    """Training of every parameter of a block that requires a gradient, on the error of the block's output.

    A batch is `(hidden, target)` or `(hidden, target, auxiliary)`, all `[windows, sequence_length, hidden]`, and where
    the block's other arguments differ between windows, the number of each window, `[windows]`:

    - `hidden`: output of the quantized blocks before this one.
    - `target`: output of the full-precision block behind the full-precision blocks before it.
    - `auxiliary`: output of the full-precision block for `hidden`, for the auxiliary loss.

    Args:
        block: the block, its linear layers fake-quantized.
        arguments: the block's other arguments, on the block's device.
        config: settings of the training.
        precision: Lightning's name of the precision to autocast to.
        context: facts of the block's place in the model.
        call: how training steps call the block: as it is, or as compiled code.
    """

    config: ReconstructionConfig

    def __init__(
        self,
        block: nn.Module,
        arguments: BlockArguments,
        config: ReconstructionConfig,
        precision: str,
        context: LossContext = LossContext(),
        call: BlockCall = call_block,
    ) -> None:
        super().__init__(config, precision)
        self.block, self.arguments = block, arguments
        self._call = call
        # The tuple hides the norm from PyTorch, which would make it a part of this module.
        self._context: tuple[LossContext] = (context,)

    def forward(self, hidden: Tensor, windows: Windows = ()) -> Tensor:
        """Return the quantized block's output for inputs `[windows, sequence_length, hidden]`, in the same shape."""
        call = self._call if torch.is_grad_enabled() else call_block  # losses are told of other batches
        with autocast(self.device, self.precision_name):
            return run_block(self.block, hidden.float(), self.arguments, windows, call)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean error over the tokens of a batch."""
        hidden, target, *auxiliary = batch
        windows = auxiliary.pop().tolist() if self.arguments.by_window else ()
        output, config = self(hidden, windows), self.config.loss
        (context,) = self._context
        channels = context.channels if config.salient_channels else None
        error = reconstruction_loss(output, target, config, context.norm, channels)
        for other in auxiliary:
            error = error + config.auxiliary * reconstruction_loss(output, other, config, context.norm, channels)
        return error

    def begin(self) -> None:
        """Let the layers go from the calibrated weights to where their training starts."""
        for module in self.block.modules():
            if isinstance(module, FakeQuantizedLinear):
                module.begin()

    def kinds(self) -> list[ParameterKind]:
        """Return the parameters of single weights and those of the grids."""
        layers = [module for module in self.block.modules() if isinstance(module, FakeQuantizedLinear)]
        grid: list[Any] = [parameter for layer in layers for parameter in layer.grid]
        per_weight: list[Any] = [parameter for layer in layers for parameter in layer.per_weight]
        bound = max((layer.bound for layer in layers), default=LARGEST_OFFSET)
        return [ParameterKind(per_weight, self.config.per_weight, bound), ParameterKind(grid, self.config.grid)]
