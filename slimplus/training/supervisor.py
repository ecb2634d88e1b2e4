"""The callback that skips bad steps, keeps the best state, and lets a training be interrupted at any step."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import discard_gradient, gradient_norm, takes_step
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.module import QuantizerTraining
from slimplus.training.step_guard import StepGuard


class Supervisor(Callback):
    """Callback that skips bad steps, keeps the best state and writes checkpoints.

    A checkpoint is written at the end of each epoch, once `seconds` have passed since the last one, and when the job is
    pre-empted. All decisions come from one sum over the ranks at each step, so that the ranks agree. Checkpoints are
    written after whole steps only, when no gradients are pending.

    Args:
        checkpoints: checkpoints of the training.
        seconds: seconds of training between two checkpoints within an epoch; 0 for a checkpoint at every step.
        preemption: the signals of this process.
        logged: rows of the CSV log of an earlier start.
        guard: judge of the steps.
        patience: number of epochs without a lower loss that ends the training; None for no early end.

    Attributes:
        guard: judge of the steps.
        loss_sum: sum of the losses of the steps taken in this epoch, each a mean over the ranks.
        steps: number of steps taken in this epoch.
        loss: mean loss over the steps of the best epoch.
        best: trained parameters after the best epoch, on the CPU.
        waited: number of epochs since the best one.
    """

    def __init__(
        self,
        checkpoints: TrainingCheckpoints,
        seconds: float,
        preemption: Preemption,
        logged: list[dict[str, Any]],
        guard: StepGuard,
        patience: int | None,
    ) -> None:
        self.checkpoints, self.seconds, self.preemption, self.logged = checkpoints, seconds, preemption, logged
        self.guard, self.patience = guard, patience
        self.loss_sum, self.steps = 0.0, 0
        self.loss, self.waited = math.inf, 0
        self.best: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()
        self._stepped = self._asked = self._due = self._cut_short = False

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs to go on alike, for a checkpoint."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "guard": self.guard.state_dict(),
            "epoch": [self.loss_sum, self.steps],
            "best": [self.loss, self.waited, self.best],
            "generators": generators,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, and that of the random number generators, from a checkpoint."""
        self.guard.load_state_dict(state_dict["guard"])
        self.loss_sum, self.steps = state_dict["epoch"]
        self.loss, self.waited, self.best = state_dict["best"]
        torch.set_rng_state(state_dict["generators"]["cpu"].cpu())
        if torch.cuda.is_available() and "cuda" in state_dict["generators"]:
            torch.cuda.set_rng_state(state_dict["generators"]["cuda"].cpu())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows of an earlier start to the CSV log, and end a training whose patience is used up."""
        self._end_early(trainer)
        for log in trainer.loggers:
            if isinstance(log, CSVLogger) and trainer.is_global_zero:  # the logger begins with an empty file
                log.experiment.metrics.extend(row for row in self.logged if int(row["step"]) < trainer.global_step)
                log.save()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the sums of the epoch."""
        self.loss_sum, self.steps = 0.0, 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decide with all ranks whether the step is taken, and whether a checkpoint or the end of the job is due."""
        assert isinstance(pl_module, QuantizerTraining)
        if not takes_step(trainer):
            return
        waited = trainer.is_global_zero and time.monotonic() - self._saved_at >= self.seconds
        norm, loss, asked, warned, due = self._sum(trainer, pl_module.take_loss(), waited)
        norm /= pl_module.loss_scale
        pl_module.log("grad_norm", norm)
        if not math.isfinite(norm) and pl_module.loss_scale > 1:
            pl_module.loss_scale /= 2  # float16 overflowed, which is no fault of the training
            self.guard.skipped += 1
            discard_gradient(trainer)
        elif self.guard.admits(norm):
            self.loss_sum += loss
            self.steps += 1
        else:
            discard_gradient(trainer)
        self._stepped, self._asked, self._due = True, bool(asked), bool(due)
        if asked:
            self.preemption.share(signal.SIGUSR1 if warned else signal.SIGTERM)

    def _sum(self, trainer: L.Trainer, loss: Tensor, due: bool) -> list[float]:
        """Return gradient norm, mean loss, and the numbers of ranks with any signal, with SIGUSR1, and with `due`."""
        share = torch.tensor([gradient_norm(trainer), float(loss)], dtype=torch.float64) / trainer.world_size
        received = self.preemption.received
        votes = torch.tensor([received is not None, received == signal.SIGUSR1, due], dtype=torch.float64)
        local = torch.cat([share, votes]).to(loss.device)
        summed: list[float] = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        return summed

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop or write a checkpoint after a whole step, if one of them is due."""
        if not self._stepped:
            return
        self._stepped = False
        last = trainer.is_last_batch  # the end of the epoch writes a checkpoint
        if self.guard.diverged:
            trainer.should_stop = self._cut_short = True
        elif self._asked:
            trainer.should_stop = True
            self._cut_short = not last
        if not last and not self.guard.diverged and (self._asked or self._due):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the state if it is the best one, and write a checkpoint, after a whole epoch."""
        if not self._cut_short:  # Lightning calls this after a part of an epoch as well
            self._judge_epoch(trainer, pl_module)
            self._save(trainer)

    def _judge_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the state if it is the best one; all ranks hold the same losses, so that they agree."""
        assert isinstance(module, QuantizerTraining)
        loss = self.loss_sum / self.steps if self.steps else math.inf
        self.waited += 1
        if loss < self.loss or not self.best:
            state = trainer.strategy.lightning_module_state_dict()  # collective
            self.best = {name: t.detach().cpu().clone() for name, t in module.trained_state(state).items()}
            self.loss, self.waited = loss, 0
        self._end_early(trainer)

    def _end_early(self, trainer: L.Trainer) -> None:
        """Stop the training if the patience is used up."""
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint and the logs."""
        trainer.save_checkpoint(self.checkpoints.path)
        for log in trainer.loggers:
            log.save()
        self._saved_at = time.monotonic()
