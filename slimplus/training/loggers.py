"""Loggers by name: where the losses and learning rates of a job's trainings go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from slimplus.utils.errors import InputError, named_first_line

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
        "mlflow": lambda: MLFlowLogger(PROJECT, f"{run}/{training}", tracking_uri=_mlflow_uri(logs), tags={"run": run}),
    }
    return [makers[name]() for name in names]


def check_trackers(names: Sequence[str], logs: Path) -> None:
    """Check that Weights & Biases and MLflow, where they are among the loggers, take what a training logs.

    Args:
        names: names of loggers.
        logs: folder for the logs.

    Raises:
        InputError: if one does not, with its own reason.
    """
    if "wandb" in names:
        _check_wandb()
    if "mlflow" in names:
        _check_mlflow(_mlflow_uri(logs))


def _check_wandb() -> None:
    """Check that the library loads, and that the user is known where runs are sent to a server."""
    remedy = "run `wandb login`, or set WANDB_MODE=offline"
    try:
        import wandb
    except ImportError as error:
        raise InputError(_unusable("wandb", error, "pip install --upgrade wandb")) from error
    if os.environ.get("WANDB_MODE", "online") == "online":
        try:
            known = wandb.login(prompt=False)
        except wandb.Error as error:
            raise InputError(_unusable("wandb", error, remedy)) from error
        if not known:
            raise InputError(f"trainer.logger: wandb has no API key; {remedy}")


def _check_mlflow(uri: str) -> None:
    """Check that the library loads, and that its server or database answers."""
    try:
        from mlflow import MlflowClient, MlflowException
    except ImportError as error:
        raise InputError(_unusable("mlflow", error, "pip install --upgrade mlflow")) from error
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        remedy = "set MLFLOW_TRACKING_URI to a server or database, and install the whole of mlflow for the latter"
        raise InputError(_unusable("mlflow", error, remedy)) from error


def _unusable(name: str, error: Exception, remedy: str) -> str:
    return f"trainer.logger: {name} cannot be used ({named_first_line(error)}); {remedy}"


def _mlflow_uri(logs: Path) -> str:
    """Return where MLflow tracks runs: where its own variable says, or a database below `logs`.

    Without either, MLflow would choose plain files, which its present versions refuse to write.
    """
    if (given := os.environ.get("MLFLOW_TRACKING_URI")) is not None:
        return given
    logs.mkdir(parents=True, exist_ok=True)  # a database is not created in a folder that is not there
    return f"sqlite:///{logs.resolve()}/mlflow.db"


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """End the runs of Weights & Biases, which would take in the next training otherwise."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
