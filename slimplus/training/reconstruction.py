"""One transformer block as a LightningModule: its quantizers learn to reproduce the full-precision block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from slimplus.models.precision import autocast
from slimplus.models.streaming import BlockArguments, run_block


@dataclass(frozen=True)
class ReconstructionConfig:
    """How a block's quantizers are trained.

    Attributes:
        epochs: passes over the calibration windows.
        batch_size: windows a step, of all devices together.
        accumulate_grad_batches: parts in which a device takes its share of a step, one after the other.
        learning_rate: peak; it falls to zero along a cosine.
        weight_decay: of AdamW.
    """

    epochs: int
    batch_size: int
    accumulate_grad_batches: int
    learning_rate: float
    weight_decay: float


def normalized_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of `|output - target|² / |target|²`; both `[..., hidden]`.

    A plain mean squared error is ruled by the few tokens whose activations are thousands of times larger than the
    others' ("Massive Activations in Large Language Models", arXiv 2402.17762).
    """
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-6)).mean()


class BlockReconstruction(L.LightningModule):
    """Trains every parameter of `block` that requires a gradient on `normalized_error`.

    A batch is `(hidden, target)`, both `[windows, sequence_length, hidden]`: the output of the quantized blocks before
    this one, and the full-precision block's output along the full-precision chain.

    Args:
        block: the block, its linear layers fake-quantized.
        arguments: the block's other arguments, on its device.
        config: epochs, rates.
        precision: Lightning's name of the precision to autocast to.

    Attributes:
        steps: of the whole training; set before it begins.
    """

    steps: int

    def __init__(
        self, block: nn.Module, arguments: BlockArguments, config: ReconstructionConfig, precision: str
    ) -> None:
        super().__init__()
        self.block, self.arguments, self.config, self.precision_name = block, arguments, config, precision
        self._losses: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """`[windows, sequence_length, hidden]` → the same."""
        with autocast(self.device, self.precision_name):
            return run_block(self.block, hidden.float(), self.arguments)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        hidden, target = batch
        loss = normalized_error(self(hidden), target)
        self._losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def take_loss(self) -> Tensor:
        """Mean loss of the batches since the last call."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean loss over `batches`."""
        losses = [normalized_error(self(hidden.to(self.device)), target.to(self.device)) for hidden, target in batches]
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, betas=(0.9, 0.95)
        )
        # Not `estimated_stepping_batches`: that sets up the loader before a checkpoint has told it where to go on.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(self.steps, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
