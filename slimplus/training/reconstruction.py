"""One transformer block as a LightningModule: its quantizers learn to reproduce the full-precision block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from slimplus.models.precision import autocast
from slimplus.models.streaming import BlockArguments, run_block
from slimplus.training.zero import gradient_norm


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
    """

    def __init__(
        self, block: nn.Module, arguments: BlockArguments, config: ReconstructionConfig, precision: str
    ) -> None:
        super().__init__()
        self.block, self.arguments, self.config, self.precision_name = block, arguments, config, precision

    def forward(self, hidden: Tensor) -> Tensor:
        """`[windows, sequence_length, hidden]` → the same."""
        with autocast(self.device, self.precision_name):
            return run_block(self.block, hidden.float(), self.arguments)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        hidden, target = batch
        loss = normalized_error(self(hidden), target)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:  # DeepSpeed keeps them to itself
            self.log("grad_norm", nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, *_: Any) -> None:
        if (norm := gradient_norm(self.trainer.strategy)) is not None:
            self.log("grad_norm", norm)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, betas=(0.9, 0.95)
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
