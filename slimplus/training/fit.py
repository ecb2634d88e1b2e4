"""One Lightning Trainer per fit: loggers, checkpoints, progress, strategy; and what follows when it fails."""

from __future__ import annotations

import csv
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from slimplus.distributed.preemption import Preemption
from slimplus.distributed.ranks import Ranks
from slimplus.distributed.strategies import Offload, build_strategy
from slimplus.models.streaming import windows_at_a_time
from slimplus.training.checkpoints import END_TO_END, Attempt, TrainingCheckpoints
from slimplus.training.module import QuantizerTraining
from slimplus.training.sampler import StepSampler
from slimplus.training.supervisor import Supervisor
from slimplus.utils.errors import InputError

logger = logging.getLogger(__name__)

RATES = (1.0, 0.1)  # parts of the learning rate: of the first attempt, and of the one after a divergence


@dataclass(frozen=True)
class FitConfig:
    """Where and how the Trainers of a job run.

    Attributes:
        devices, num_nodes, strategy, offload: as Lightning's Trainer and `build_strategy` take them.
        logs: folder of the TensorBoard and CSV logs.
        seed: of the order of the windows.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """

    devices: int
    num_nodes: int
    strategy: str
    offload: Offload
    logs: Path
    seed: int
    checkpoint_seconds: float


@dataclass(frozen=True)
class FitResult:
    """How a training went.

    Attributes:
        loss: mean of the best epoch, or what its end was measured at; None if every attempt diverged.
        calibrated_loss: before training.
        skipped: steps whose gradient was not fit to be used.
        events: what a reader of the results should know.
    """

    loss: float | None
    calibrated_loss: float
    skipped: int
    events: tuple[str, ...]

    @property
    def helped(self) -> bool:
        """Whether the trained quantizers are better than the calibrated ones."""
        return self.loss is not None and self.loss <= self.calibrated_loss


class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """Goes on with the batch after the last one it gave before a checkpoint; Lightning keeps its state there."""

    given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.given % len(self)
        for number, batch in enumerate(islice(super().__iter__(), start, None), start + 1):
            self.given = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


@dataclass(frozen=True)
class Fit:
    """One training: its module, its data, and where it runs.

    Attributes:
        module: what is trained, in place; it is left in the state after its best epoch.
        data: this rank's share of what a batch is made of, `[windows, …]` each.
        name: of the training, in the logs.
        checkpoints: of this training.
        fabric: the processes of the job.
        config: where and how to train.
        preemption: the signals of this process.
    """

    module: QuantizerTraining
    data: tuple[Tensor, ...]
    name: str
    checkpoints: TrainingCheckpoints
    fabric: Fabric
    config: FitConfig
    preemption: Preemption

    def __call__(self) -> FitResult:
        """Train, going on from the last checkpoint if there is one.

        A training that diverges begins anew at a lower learning rate, one that runs out of memory with smaller parts
        of a step.

        Raises:
            Preempted: once a checkpoint of the step in progress has been written.
            InputError: if a single window does not fit the device, or any one of several does not.
        """
        module, recipe = self.module, self.module.config
        initial = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        calibrated_loss, loss_scale = self._evaluate(), module.loss_scale
        first = Attempt(self.checkpoints.made_from, recipe.accumulate_grad_batches)
        share = recipe.batch_size // self.fabric.world_size
        attempt, found = self.checkpoints.begin(first, self.fabric, share)
        while attempt.restarts < len(RATES):
            for name, parameter in module.named_parameters():
                if name in initial:
                    parameter.data = initial[name].to(parameter.device, copy=True)
            module.slowdown, module.loss_scale = RATES[attempt.restarts], loss_scale
            supervisor = self._attempt(attempt, found)
            # The Trainer and what it made refer to each other, and to the windows and the block: gigabytes, of which
            # Python would let those of dozens of blocks pile up before it looks for such cycles by itself.
            module.forget_attempt()
            gc.collect()
            if supervisor is not None and not supervisor.guard.diverged:
                module.load_state_dict(supervisor.best, strict=False)
                loss = supervisor.loss
                # The mean over an epoch lags behind the epoch's end.
                if loss > calibrated_loss or module.judged is not None:
                    loss = self._evaluate()
                return FitResult(loss, calibrated_loss, supervisor.guard.skipped, attempt.events)
            attempt, found = self._next(attempt, supervisor), False
            logger.warning("%s: %s", self.name, attempt.events[-1])
            if self.fabric.is_global_zero:
                self.checkpoints.renew(attempt)
            self.fabric.barrier()
        return FitResult(None, calibrated_loss, 0, attempt.events)

    def _evaluate(self) -> float:
        """Loss of the module as it is, over all ranks' windows, or those that it is judged by."""
        self.module.to(self.fabric.device)
        ranks, judged, windows = Ranks(self.fabric.global_rank, self.fabric.world_size), self.module.judged, 1
        if judged is None:  # the predictions of a whole model for many windows might not fit
            windows = windows_at_a_time(self.fabric.device, self.data[0].shape[1])
        share = None if judged is None else max(judged // ranks.count, 1)  # the ranks hold every n-th window
        mean = self.module.evaluate(zip(*(tensor[:share].split(windows) for tensor in self.data), strict=True))
        return float(ranks.sum(mean.double()) / ranks.count)

    def _next(self, attempt: Attempt, supervisor: Supervisor | None) -> Attempt:
        """What to try after a divergence, or where there is no supervisor, after running out of memory."""
        if supervisor is not None:
            skipped, restarts = supervisor.guard.skipped, attempt.restarts + 1
            then = "training began anew at a tenth of the learning rate"
            then = then if restarts < len(RATES) else "the calibrated quantizers are kept"
            event = f"the gradient was not finite or exploded in {skipped} steps; {then}"
            return replace(attempt, restarts=restarts, events=(*attempt.events, event))
        torch.cuda.empty_cache()
        windows = self.module.config.batch_size // attempt.parts
        split = next((n for n in range(2 * attempt.split, windows + 1) if windows % n == 0), None)
        if split is None:
            raise InputError(self._out_of_memory(1))
        event = f"out of device memory; {windows // split} windows at a time instead of {windows // attempt.split}"
        return replace(attempt, split=split, events=(*attempt.events, event))

    def _out_of_memory(self, windows: int) -> str:
        """What to do about it where so many windows at a time were too many."""
        whole = self.name == END_TO_END
        if windows > 1:
            key = f"{END_TO_END if whole else 'training'}.accumulate_grad_batches"
            problem, remedy = "out of device memory", f"a larger {key}, which changes no result"
        else:
            blocks = "trainer.strategy=deepspeed_stage_3 and trainer.offload=parameters"
            problem = "out of device memory while one window is trained on"
            remedy = f"{'end_to_end.activation_checkpointing=true' if whole else blocks}, or a lower "
            remedy += "data.sequence_length in another run_dir"
        return f"{problem}; give {remedy}; finished blocks are kept"

    def _loader(self, parts: int) -> ResumableLoader:
        ranks, step = Ranks(self.fabric.global_rank, self.fabric.world_size), self.module.config.batch_size
        sampler = StepSampler(len(self.data[0]) * ranks.count, step, ranks, self.config.seed)
        return ResumableLoader(TensorDataset(*self.data), batch_size=step // (ranks.count * parts), sampler=sampler)

    def _attempt(self, attempt: Attempt, found: bool) -> Supervisor | None:
        """Train once; what became of it, or None where the device's memory did not suffice."""
        parts, config = attempt.parts * attempt.split, self.config
        loader = self._loader(parts)
        self.module.steps = self.module.config.epochs * len(loader) // parts
        L.seed_everything(config.seed, verbose=False)
        with _quiet():
            logged = _logged(config.logs / "csv" / self.name / "metrics.csv") if found else []
            patience = self.module.config.patience
            supervisor = Supervisor(self.checkpoints, config.checkpoint_seconds, self.preemption, logged, patience)
            trainer = L.Trainer(
                accelerator=self.fabric.device.type,
                devices=config.devices,
                num_nodes=config.num_nodes,
                strategy=build_strategy(config.strategy, self.fabric, config.offload),
                plugins=[self.checkpoints],
                precision="32-true",  # the module autocasts by itself
                max_epochs=self.module.config.epochs,
                accumulate_grad_batches=parts,
                logger=[
                    TensorBoardLogger(config.logs, name="tensorboard", version=self.name),
                    CSVLogger(config.logs, name="csv", version=self.name),
                ],
                callbacks=[
                    supervisor,
                    LearningRateMonitor(logging_interval="step"),
                    TQDMProgressBar(refresh_rate=10, process_position=1, leave=False),
                ],
                log_every_n_steps=min(10, len(loader) // parts),
                default_root_dir=self.checkpoints.folder,  # where it looks for checkpoints by SLURM's requeueing
                enable_checkpointing=False,  # the supervisor's
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            # Lightning's handler of SIGTERM broadcasts from wherever the signal meets it.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            try:
                with self.preemption.deferred():
                    path = str(self.checkpoints.path) if found else None
                    trainer.fit(self.module, loader, ckpt_path=path, weights_only=True)
            except SystemExit:
                if trainer.interrupted:  # Lightning turns Ctrl-C into an exit of its own
                    raise KeyboardInterrupt from None
                raise
            except torch.OutOfMemoryError as error:
                # Several processes wait for each other in a collective, and DeepSpeed has taken the module apart.
                if self.fabric.world_size > 1 or config.strategy.startswith("deepspeed"):
                    windows = self.module.config.batch_size // (self.fabric.world_size * parts)
                    raise InputError(self._out_of_memory(windows)) from error
                return None
        return supervisor


def _logged(file: Path) -> list[dict[str, Any]]:
    """Rows of a CSV log."""
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row.get("step")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning introduces itself at every Trainer, and warns of too few loader workers and of the logs' folder.

    The windows lie in memory, where workers would only copy them, and there is one Trainer a block.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*in eval mode.*",  # blocks stay in it: dropout has no place in a reconstruction
                ".*exists and is not empty.*",
                ".*will be overwritten.*",
                ".*before `optimizer.step\\(\\)`.*",  # of the schedule, where the first step was skipped
                ".*LeafSpec.*",  # Lightning's use of a name that PyTorch is about to retire
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
