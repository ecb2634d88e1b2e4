"""One Lightning Trainer per block: loggers, checkpoints, progress, strategy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from slimplus.training.ranks import Ranks
from slimplus.training.reconstruction import BlockReconstruction
from slimplus.training.sampling import StepSampler
from slimplus.training.strategies import Offload, build_strategy

CHECKPOINT = Path("last.ckpt")  # one an epoch, each in the place of the one before


@dataclass(frozen=True)
class FitConfig:
    """Where and how the Trainers of a job run.

    Attributes:
        devices, num_nodes, strategy, offload: as Lightning's Trainer and `build_strategy` take them.
        logs: folder of the TensorBoard and CSV logs.
        seed: of the order of the windows.
    """

    devices: int
    num_nodes: int
    strategy: str
    offload: Offload
    logs: Path
    seed: int


def fit_block(
    module: BlockReconstruction,
    hidden: Tensor,
    targets: Tensor,
    name: str,
    checkpoints: Path,
    fabric: Fabric,
    config: FitConfig,
) -> float | None:
    """Train `module` in place on this rank's windows; goes on from the last checkpoint in `checkpoints`, if any.

    Args:
        module: the block with its learnable quantizers.
        hidden: its inputs, `[windows, sequence_length, hidden]`.
        targets: what it should give, the same shape.
        name: of the block, in the logs.
        checkpoints: folder for this block's Lightning checkpoints, one an epoch.
        fabric: the processes of the job.
        config: where and how to train.

    Returns:
        The mean loss of the last epoch; None if the checkpoint was that of a finished training.
    """
    ranks, step = Ranks(fabric.global_rank, fabric.world_size), module.config.batch_size
    sampler = StepSampler(len(hidden) * ranks.count, step, ranks, config.seed)
    share = step // (ranks.count * module.config.accumulate_grad_batches)
    loader = DataLoader(TensorDataset(hidden, targets), batch_size=share, sampler=sampler)
    last = checkpoints / CHECKPOINT
    with _quiet():
        trainer = L.Trainer(
            accelerator=fabric.device.type,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=build_strategy(config.strategy, fabric, config.offload),
            precision="32-true",  # the module autocasts by itself
            max_epochs=module.config.epochs,
            accumulate_grad_batches=module.config.accumulate_grad_batches,
            logger=_loggers(config.logs, name),
            callbacks=_callbacks(checkpoints),
            log_every_n_steps=min(10, sampler.steps),
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning turns Ctrl-C into an exit of its own
                raise KeyboardInterrupt from None
            raise
    loss = trainer.callback_metrics.get("loss_epoch")
    return None if loss is None else float(loss)


def _loggers(folder: Path, name: str) -> list[Logger]:
    return [
        TensorBoardLogger(folder, name="tensorboard", version=name),
        CSVLogger(folder, name="csv", version=name),
    ]


def _callbacks(checkpoints: Path) -> list[Callback]:
    return [
        LearningRateMonitor(logging_interval="step"),
        ModelCheckpoint(checkpoints, filename=CHECKPOINT.stem, enable_version_counter=False),
        TQDMProgressBar(refresh_rate=10, process_position=1, leave=False),
    ]


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
                ".*LeafSpec.*",  # Lightning's use of a name that PyTorch is about to retire
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
