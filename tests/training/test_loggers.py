"""Loggers by name."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import loggers as lightning_loggers

from slimplus.recipe import preflight
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs
from slimplus.recipe.section import RecipeError
from slimplus.training import loggers
from slimplus.training.loggers import build_loggers, check_trackers, finish_loggers
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import run


def test_names_give_lightnings_loggers(tmp_path: Path) -> None:
    logs = tmp_path / "mine" / "logs"
    tensorboard, csv = build_loggers(["tensorboard", "csv"], logs, "block_003")
    assert isinstance(tensorboard, lightning_loggers.TensorBoardLogger)
    assert isinstance(csv, lightning_loggers.CSVLogger)
    assert Path(tensorboard.log_dir) == logs / "tensorboard" / "block_003"
    assert Path(csv.log_dir) == logs / "csv" / "block_003"


class Recorded:
    """A logger in the place of one whose library is not installed."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        self.given, self.finished = (positional, keywords), 0
        self.experiment = self

    def finish(self) -> None:
        self.finished += 1


def test_a_training_is_a_run_of_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(loggers, name, type(name, (Recorded,), {}))
    logs = tmp_path / "mine" / "logs"
    wandb, mlflow = made = build_loggers(["wandb", "mlflow"], logs, "block_003")
    assert isinstance(wandb, Recorded)
    assert isinstance(mlflow, Recorded)
    assert wandb.given == (("mine/block_003", logs), {"project": "slimplus", "group": "mine"})
    tracked = {"tracking_uri": f"sqlite:///{logs}/mlflow.db", "tags": {"run": "mine"}}
    assert mlflow.given == (("slimplus", "mine/block_003"), tracked)
    finish_loggers(made)
    assert (wandb.finished, mlflow.finished) == (1, 0)


def test_a_library_that_is_missing_is_said_before_any_work(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight.importlib.util.find_spec
    absent = ("wandb", "mlflow")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(RecipeError) as error:
        check_inputs(load_recipe(arguments(tmp_path / "run", "trainer.logger=[wandb, mlflow]")))
    assert str(error.value) == (
        "trainer.logger: wandb is not installed; pip install wandb\n"
        "trainer.logger: mlflow is not installed; pip install mlflow"
    )
    with pytest.raises(RecipeError, match=r"trainer\.logger"):
        load_recipe(arguments(tmp_path / "run", "trainer.logger=[]"))


class TrackerError(Exception):
    """What a tracker's library raises."""


@pytest.mark.parametrize(
    ("mode", "known", "said"), [("online", True, ""), ("offline", False, ""), ("online", False, "API key")]
)
def test_runs_go_to_weights_and_biases_only_where_it_knows_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, known: bool, said: str
) -> None:
    library = SimpleNamespace(login=lambda prompt: known or prompt, Error=TrackerError)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(InputError, match=said) if said else nullcontext():
        check_trackers(["csv", "wandb"], tmp_path)


def test_a_tracker_that_does_not_answer_is_said_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(max_results: int) -> None:
        raise TrackerError("connection refused\nat length")

    asked: list[str] = []

    def connect(uri: str) -> SimpleNamespace:
        asked.append(uri)
        return SimpleNamespace(search_experiments=search)

    library = SimpleNamespace(MlflowClient=connect, MlflowException=TrackerError)
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    with pytest.raises(InputError) as error:
        check_trackers(["mlflow"], tmp_path / "logs")
    assert asked == ["http://tracker"]
    assert not (tmp_path / "logs").exists()
    assert str(error.value).startswith("trainer.logger: mlflow cannot be used (TrackerError: connection refused); set ")
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as an installation whose import fails
    with pytest.raises(InputError, match=r"trainer\.logger: mlflow cannot be used .*; pip install --upgrade mlflow"):
        check_trackers(["mlflow"], tmp_path / "logs")


def test_a_run_writes_the_logs_it_is_asked_for_and_may_change_its_mind(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments(tmp_path / "run", "trainer.logger=[csv]"))
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["csv"]
    run(arguments(tmp_path / "run"))
