"""Loggers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import loggers as lightning_loggers

from slimplus.recipe import preflight
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs
from slimplus.recipe.section import RecipeError
from slimplus.training import loggers
from slimplus.training.loggers import build_loggers, finish_loggers
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
    for name in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(loggers, name, type(name, (Recorded,), {}))
    logs = tmp_path / "mine" / "logs"
    wandb, mlflow = made = build_loggers(["wandb", "mlflow"], logs, "block_003")
    assert isinstance(wandb, Recorded)
    assert isinstance(mlflow, Recorded)
    assert wandb.given == (("mine/block_003", logs), {"project": "slimplus", "group": "mine"})
    tracked = {"save_dir": str(logs / "mlruns"), "tags": {"run": "mine"}}
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


def test_a_run_writes_the_logs_it_is_asked_for_and_may_change_its_mind(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments(tmp_path / "run", "trainer.logger=[csv]"))
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["csv"]
    run(arguments(tmp_path / "run"))
