"""What the trainings of a job share: one block's, and that of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from slimplus.models.precision import LOSS_SCALES
from slimplus.training.optimizers import Name, ParameterKind, RateConfig, build_optimizer


@dataclass(frozen=True)
class TrainingConfig:
    """How quantizers are trained.

    Attributes:
        epochs: passes over the calibration windows.
        batch_size: windows a step, of all devices together.
        accumulate_grad_batches: parts in which a device takes its share of a step, one after the other.
        optimizer: its name.
        grid: rate of the ends of each grid, in steps of its scale.
        weight_decay: of the AdamWs.
        warmup: steps over which the rates rise.
        patience: epochs without a lower loss that end a training; None for no early end.
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
    """Trains every parameter that requires a gradient on `loss`, which a subclass defines.

    Args:
        config: epochs, rates.
        precision: Lightning's name of the precision to autocast to.

    Attributes:
        steps: of the whole training; set before it begins.
        slowdown: part of the learning rates that is used.
        loss_scale: factor on the loss, and so on the gradients, that the precision needs; the supervisor lowers it.
        judged: windows of all ranks that tell whether training helped; None for all, as an epoch has them.
    """

    steps: int
    slowdown = 1.0
    judged: int | None = None

    def __init__(self, config: TrainingConfig, precision: str) -> None:
        super().__init__()
        self.config, self.precision_name = config, precision
        self.loss_scale = LOSS_SCALES.get(precision, 1.0)
        self._losses: list[Tensor] = []
        self.strict_loading = False  # a checkpoint holds what is trained

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean over the tokens of a batch."""
        raise NotImplementedError

    def kinds(self) -> list[ParameterKind]:
        """The trained parameters."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor:
        loss = self.loss(batch)
        self._losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss * self.loss_scale

    def forget_attempt(self) -> None:
        """Let go of the Trainer, and of what a step that was not finished left."""
        self.trainer = None
        self._losses.clear()

    def take_loss(self) -> Tensor:
        """Mean loss of the batches since the last call."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, ...]]) -> Tensor:
        """Mean loss over the windows of `batches`."""
        losses, windows = [], 0
        for batch in batches:
            losses.append(self.loss(tuple(tensor.to(self.device) for tensor in batch)) * len(batch[0]))
            windows += len(batch[0])
        return torch.stack(losses).sum() / windows

    def trained_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of a state dict, what is trained."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained_state(checkpoint["state_dict"])
        checkpoint["loss_scale"] = self.loss_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loss_scale = checkpoint["loss_scale"]

    def configure_optimizers(self) -> Any:
        # Not `estimated_stepping_batches`: that sets up the loader before a checkpoint has told it where to go on.
        config = self.config
        return build_optimizer(
            config.optimizer, self.kinds(), max(self.steps, 1), config.weight_decay, config.warmup, self.slowdown
        )
