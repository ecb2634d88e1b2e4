"""The LightningModule that the training of a block and the training of the whole model derive from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from slimplus.models.precision import LOSS_SCALES
from slimplus.models.streaming import windows_at_a_time
from slimplus.training.optimizers import Name, ParameterKind, RateConfig, build_optimizer

JUDGED = 16  # windows that tell whether training helped: evaluating all of many would take as long as an epoch


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training of quantizers.

    Attributes:
        epochs: number of passes over the calibration windows.
        batch_size: number of windows per step, on all devices together.
        accumulate_grad_batches: number of parts in which a device takes its share of a step, one after the other.
        optimizer: name of the optimizer.
        grid: learning rate of the two ends of each quantization grid, in units of the grid's scale.
        weight_decay: weight decay of `adamw` and `adamw_8bit`.
        warmup: number of steps over which the learning rates rise.
        patience: number of epochs without a lower loss that ends the training; None for no early end.
    """

    epochs: int
    batch_size: int
    accumulate_grad_batches: int = 1
    optimizer: Name = "adamw"
    grid: RateConfig = field(default_factory=RateConfig)
    weight_decay: float = 0.0
    warmup: int = 0
    patience: int | None = None


class QuantizerTraining(L.LightningModule):
    """Training of every parameter that requires a gradient; a subclass defines `loss` and `kinds`.

    Args:
        config: settings of the training.
        precision: Lightning's name of the precision to autocast to.

    Attributes:
        steps: number of steps of the whole training; set before the training begins.
        slowdown: factor on the learning rates, for a new attempt after a divergence.
        loss_scale: factor on the loss, and so on the gradients, that the precision needs; the supervisor lowers it.
    """

    steps: int
    slowdown = 1.0

    def __init__(self, config: TrainingConfig, precision: str) -> None:
        super().__init__()
        self.config, self.precision_name = config, precision
        self.loss_scale = LOSS_SCALES.get(precision, 1.0)
        self._losses: list[Tensor] = []
        self.strict_loading = False  # a checkpoint holds the trained parameters only

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss over the tokens of a batch.

        Args:
            batch: tensors `[windows, …]`; which tensors depends on the subclass.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Say that the training begins: the loss before is that of the calibrated quantizers."""

    def kinds(self) -> list[ParameterKind]:
        """Return the trained parameters, grouped by how they learn."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor:
        """Return the scaled loss of a batch, and log the loss."""
        loss = self.loss(batch)
        self._losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss * self.loss_scale

    def forget_attempt(self) -> None:
        """Drop the reference to the Trainer, and the losses of an unfinished step."""
        self.trainer = None
        self._losses.clear()

    def take_loss(self) -> Tensor:
        """Return the mean loss of the batches since the last call."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    def evaluated_together(self, length: int) -> int:
        """Return how many windows of `length` tokens are evaluated at a time."""
        return windows_at_a_time(self.device, length)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, ...]]) -> Tensor:
        """Return the mean loss over the windows of all batches."""
        losses, windows = [], 0
        for batch in batches:
            losses.append(self.loss(tuple(tensor.to(self.device) for tensor in batch)) * len(batch[0]))
            windows += len(batch[0])
        return torch.stack(losses).sum() / windows

    def trained_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a state dict that belong to trained parameters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduce a checkpoint to the trained parameters, and add the loss scale."""
        checkpoint["state_dict"] = self.trained_state(checkpoint["state_dict"])
        checkpoint["loss_scale"] = self.loss_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loss scale from a checkpoint."""
        self.loss_scale = checkpoint["loss_scale"]

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule over `steps`."""
        # Lightning's `estimated_stepping_batches` would set up the loader before a checkpoint restores its position.
        config = self.config
        return build_optimizer(
            config.optimizer, self.kinds(), max(self.steps, 1), config.weight_decay, config.warmup, self.slowdown
        )
