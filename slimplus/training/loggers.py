"""Loggers by name: where the losses and learning rates of a job's trainings go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

DEFAULT_LOGGERS = ("tensorboard", "csv")
PROJECT = "slimplus"  # of Weights & Biases, and experiment of MLflow


def build_loggers(names: Sequence[str], logs: Path, training: str) -> list[Logger]:
    """Return Lightning's loggers of a training, of which a job has one for each block.

    Args:
        names: `tensorboard`, `csv`, `wandb` or `mlflow`. The first two write below `logs`; the last two go where the
            variables of their libraries say (`WANDB_MODE`, `MLFLOW_TRACKING_URI`), or below `logs` as well. There a
            training is a run, named by the folder that `logs` is in.
        logs: folder for the logs.
        training: name of the training.
    """
    run = logs.resolve().parent.name
    makers = {
        "tensorboard": lambda: TensorBoardLogger(logs, name="tensorboard", version=training),
        "csv": lambda: CSVLogger(logs, name="csv", version=training),
        "wandb": lambda: WandbLogger(f"{run}/{training}", logs, project=PROJECT, group=run),
        "mlflow": lambda: MLFlowLogger(PROJECT, f"{run}/{training}", save_dir=str(logs / "mlruns"), tags={"run": run}),
    }
    return [makers[name]() for name in names]


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """End the runs of Weights & Biases, which would take in the next training otherwise."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
