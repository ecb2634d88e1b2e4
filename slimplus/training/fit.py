"""One training from start to end: its Lightning Trainer, resuming, and new attempts after a failure."""

from __future__ import annotations

import csv
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from slimplus.distributed.preemption import Preemption
from slimplus.distributed.ranks import Ranks
from slimplus.distributed.strategies import Offload, build_strategy
from slimplus.training.checkpoints import END_TO_END, Attempt, TrainingCheckpoints
from slimplus.training.loggers import DEFAULT_LOGGERS, build_loggers, finish_loggers
from slimplus.training.module import JUDGED, QuantizerTraining
from slimplus.training.sampler import StepSampler
from slimplus.training.step_guard import EXPLODED, StepGuard
from slimplus.training.supervisor import Supervisor
from slimplus.utils.errors import InputError

logger = logging.getLogger(__name__)

Report = Callable[[int, int, float], None]
"""Function that is told of a training step: its number, the number of all steps, and its loss."""

REPORT_SECONDS = 0.5  # between two reports, since reading a loss waits for a GPU
RATES = (1.0, 0.1)  # factors on the learning rates: in the first attempt, and in that after one that did not help


@dataclass(frozen=True)
class FitConfig:
    """Settings that the Trainers of a job share.

    Attributes:
        devices: number of devices on each machine.
        num_nodes: number of machines.
        strategy: name of the strategy, as `build_strategy` takes it.
        offload: part of the training that is kept in main memory, as `build_strategy` takes it.
        logs: folder of the TensorBoard and CSV logs.
        seed: seed of the order of the windows.
        checkpoint_seconds: seconds of training between two checkpoints within an epoch.
        loggers: names of the loggers, see `build_loggers`.
    """

    devices: int
    num_nodes: int
    strategy: str
    offload: Offload
    logs: Path
    seed: int
    checkpoint_seconds: float
    loggers: tuple[str, ...] = DEFAULT_LOGGERS


@dataclass(frozen=True)
class FitResult:
    """Outcome of a training.

    Attributes:
        loss: loss after the best epoch, over the first `JUDGED` windows; None if every attempt diverged.
        calibrated_loss: loss of the calibrated quantizers, before training, over the same windows.
        skipped: number of steps skipped because their gradient was not finite or had exploded.
        events: sentences that a reader of the results should know.
    """

    loss: float | None
    calibrated_loss: float
    skipped: int
    events: tuple[str, ...]

    @property
    def helped(self) -> bool:
        """Whether the trained quantizers are better than the calibrated ones."""
        return self.loss is not None and self.loss <= self.calibrated_loss


def ignore(step: int, steps: int, loss: float) -> None:
    """Take a report of a training step, and tell nobody."""


class _StepReport(Callback):
    """Callback that reports training steps, a few of them a second."""

    def __init__(self, report: Report) -> None:
        self._report, self._reported_at = report, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Report the step if the last report is some time ago."""
        now = time.monotonic()
        if now - self._reported_at >= REPORT_SECONDS:
            assert isinstance(pl_module, QuantizerTraining)
            self._reported_at = now
            self._report(trainer.global_step, pl_module.steps, float(trainer.callback_metrics["loss_step"]))


class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """DataLoader that resumes behind the last batch it gave before a checkpoint, in which Lightning keeps its state.

    Attributes:
        given: number of the last batch given in this epoch, from 1.
    """

    given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.given % len(self)
        for number, batch in enumerate(islice(super().__iter__(), start, None), start + 1):
            self.given = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, for a checkpoint."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position in the epoch from a checkpoint."""
        self.given = state["given"]


@dataclass(frozen=True)
class Fit:
    """One training of a module; calling the object trains.

    Attributes:
        module: the module, trained in place; it ends in the state after its best epoch.
        data: this rank's share of the tensors that batches are made of, `[windows, …]` each.
        name: name of the training in the logs.
        checkpoints: checkpoints of this training.
        fabric: the processes of the job.
        config: settings of the Trainer.
        preemption: the signals of this process.
        report: function that is told of training steps.
    """

    module: QuantizerTraining
    data: tuple[Tensor, ...]
    name: str
    checkpoints: TrainingCheckpoints
    fabric: Fabric
    config: FitConfig
    preemption: Preemption
    report: Report = ignore

    def __call__(self) -> FitResult:
        """Train, from the last checkpoint if there is one.

        A training that diverges or ends above the calibrated loss starts over at a lower learning rate, and one that
        runs out of device memory starts over with smaller parts of a step.

        Raises:
            Preempted: after a signal, once a checkpoint of the step in progress has been written.
            InputError: if the device's memory does not suffice for one window, or, with several processes or DeepSpeed,
                for the parts of a step that the recipe gives.
        """
        module, recipe = self.module, self.module.config
        calibrated_loss, loss_scale = self._evaluate(), module.loss_scale
        module.begin()
        initial = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        first = Attempt(self.checkpoints.parent_hash, recipe.accumulate_grad_batches)
        share = recipe.batch_size // self.fabric.world_size
        attempt, found = self.checkpoints.begin(first, self.fabric, share)
        while attempt.restarts < len(RATES):
            for name, parameter in module.named_parameters():
                if name in initial:
                    parameter.data = initial[name].to(parameter.device, copy=True)
            module.slowdown, module.loss_scale = RATES[attempt.restarts], loss_scale
            supervisor = self._attempt(attempt, found)
            # The Trainer is part of reference cycles that hold the windows and the block, which are gigabytes. Python
            # would let those of dozens of blocks pile up before it looks for cycles by itself.
            module.forget_attempt()
            gc.collect()
            if supervisor is not None and not supervisor.guard.diverged:
                module.load_state_dict(supervisor.best, strict=False)
                loss = self._evaluate()  # the mean over an epoch's steps lags behind the epoch's end
                if loss <= calibrated_loss or attempt.restarts + 1 == len(RATES):
                    return FitResult(loss, calibrated_loss, supervisor.guard.skipped, attempt.events)
                attempt = self._slower(attempt, f"training ended at a loss of {loss:.3g}, above {calibrated_loss:.3g}")
            elif supervisor is not None:
                skipped = supervisor.guard.skipped
                attempt = self._slower(attempt, f"the gradient was not finite or exploded in {skipped} steps")
            else:
                attempt = self._in_smaller_parts(attempt)
            found = False
            logger.warning("%s: %s", self.name, attempt.events[-1])
            if self.fabric.is_global_zero:
                self.checkpoints.renew(attempt)
            self.fabric.barrier()
        return FitResult(None, calibrated_loss, 0, attempt.events)

    def _evaluate(self) -> float:
        """Return the module's present loss over the first `JUDGED` windows of all ranks together."""
        self.module.to(self.fabric.device)
        ranks = Ranks(self.fabric.global_rank, self.fabric.world_size)
        together, share = self.module.evaluated_together(self.data[0].shape[1]), max(JUDGED // ranks.count, 1)
        mean = self.module.evaluate(zip(*(tensor[:share].split(together) for tensor in self.data), strict=True))
        return float(ranks.sum(mean.double()) / ranks.count)

    @staticmethod
    def _slower(attempt: Attempt, problem: str) -> Attempt:
        """Return the attempt that follows one which did not help: at a lower learning rate, if one is left."""
        restarts = attempt.restarts + 1
        then = "training started over at a tenth of the learning rate"
        then = then if restarts < len(RATES) else "the calibrated quantizers are kept"
        return replace(attempt, restarts=restarts, events=(*attempt.events, f"{problem}; {then}"))

    def _in_smaller_parts(self, attempt: Attempt) -> Attempt:
        """Return the attempt that follows one which ran out of device memory.

        Raises:
            InputError: if memory did not suffice for one window.
        """
        torch.cuda.empty_cache()
        windows = self.module.config.batch_size // attempt.parts
        split = next((n for n in range(2 * attempt.split, windows + 1) if windows % n == 0), None)
        if split is None:
            raise InputError(self._out_of_memory(1))
        event = f"out of device memory; {windows // split} windows at a time instead of {windows // attempt.split}"
        return replace(attempt, split=split, events=(*attempt.events, event))

    def _out_of_memory(self, windows: int) -> str:
        """Return the error message if memory did not suffice for training on `windows` windows at a time."""
        whole = self.name == END_TO_END
        if windows > 1:
            key = f"{END_TO_END if whole else 'training'}.accumulate_grad_batches"
            problem, remedy = "out of device memory", f"a larger {key}, which changes no result"
        else:
            blocks = "trainer.strategy=deepspeed_stage_3 and trainer.offload=parameters"
            problem = "out of device memory while training on one window"
            remedy = f"{'end_to_end.activation_checkpointing=true' if whole else blocks}, or a lower "
            remedy += "data.sequence_length in another run_dir"
        return f"{problem}; give {remedy}; finished blocks are kept"

    def _loader(self, parts: int) -> ResumableLoader:
        """Return the loader of this rank's batches, `parts` of which make its share of a step."""
        ranks, step = Ranks(self.fabric.global_rank, self.fabric.world_size), self.module.config.batch_size
        sampler = StepSampler(len(self.data[0]) * ranks.count, step, ranks, self.config.seed)
        return ResumableLoader(
            TensorDataset(*self.data),
            batch_size=step // (ranks.count * parts),
            sampler=sampler,
            pin_memory=self.fabric.device.type == "cuda",  # from which the GPU copies while it computes
        )

    def _attempt(self, attempt: Attempt, found: bool) -> Supervisor | None:
        """Train once, from the checkpoint if one was found.

        Returns:
            The callback that has supervised the training, or None if the device's memory did not suffice.

        Raises:
            InputError: if memory did not suffice, and another attempt in this process is impossible.
        """
        parts, config = attempt.parts * attempt.split, self.config
        loader = self._loader(parts)
        steps = len(loader) // parts  # in an epoch
        self.module.steps = self.module.config.epochs * steps
        L.seed_everything(config.seed, verbose=False)
        with _quiet():
            logged = _logged(config.logs / "csv" / self.name / "metrics.csv") if found else []
            patience = self.module.config.patience
            guard = StepGuard(EXPLODED[self.module.config.optimizer])
            supervisor = Supervisor(
                self.checkpoints, config.checkpoint_seconds, self.preemption, logged, guard, patience
            )
            trainer = self._trainer(supervisor, parts, steps)
            try:
                with self.preemption.deferred():
                    path = str(self.checkpoints.path) if found else None
                    trainer.fit(self.module, loader, ckpt_path=path, weights_only=True)
            except SystemExit:
                if trainer.interrupted:  # Lightning turns Ctrl-C into SystemExit
                    raise KeyboardInterrupt from None
                raise
            except torch.OutOfMemoryError as error:
                # The other processes wait in a collective, and DeepSpeed has left the module in shards.
                if self.fabric.world_size > 1 or config.strategy.startswith("deepspeed"):
                    windows = self.module.config.batch_size // (self.fabric.world_size * parts)
                    raise InputError(self._out_of_memory(windows)) from error
                return None
            finally:
                finish_loggers(trainer.loggers)
        return supervisor

    def _trainer(self, supervisor: Supervisor, parts: int, steps: int) -> L.Trainer:
        """Return a Trainer that takes a step after every `parts` batches, and `steps` steps in an epoch."""
        config = self.config
        trainer = L.Trainer(
            accelerator=self.fabric.device.type,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=build_strategy(config.strategy, self.fabric, config.offload),
            plugins=[self.checkpoints],
            precision="32-true",  # the module autocasts by itself
            max_epochs=self.module.config.epochs,
            accumulate_grad_batches=parts,
            logger=build_loggers(config.loggers, config.logs, self.name),
            callbacks=[supervisor, LearningRateMonitor(logging_interval="step"), _StepReport(self.report)],
            log_every_n_steps=min(10, steps),
            default_root_dir=self.checkpoints.folder,  # Lightning looks there for checkpoints of SLURM's requeueing
            enable_checkpointing=False,  # the supervisor writes them
            enable_model_summary=False,
            enable_progress_bar=False,  # the job has one line for all of its trainings
            use_distributed_sampler=False,
        )
        # Lightning's handler of SIGTERM would start a collective wherever the signal interrupts the process.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer


def _logged(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV log that belong to a step; none if there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row.get("step")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning would repeat for every Trainer, of which there is one per block.

    Lightning prints a banner, and warns of too few loader workers and of the logs' folder. More workers would only copy
    the windows, which lie in memory.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*in eval mode.*",  # blocks stay in eval mode: a reconstruction must not use dropout
                ".*exists and is not empty.*",
                ".*will be overwritten.*",
                ".*before `optimizer.step\\(\\)`.*",  # the schedule warns if the first step was skipped
                ".*LeafSpec.*",  # Lightning uses a name that PyTorch has deprecated
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
