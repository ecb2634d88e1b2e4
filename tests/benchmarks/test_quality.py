"""benchmarks/quality/run.py: methods side by side, one table, one plot."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

from benchmarks.quality.methods import FULL, METHODS, Budget, identity
from benchmarks.quality.report import (
    DARK,
    LADDERS,
    RESULTS,
    TEXT,
    Ladder,
    Rung,
    measured_rungs,
    plot,
    table,
)
from slimplus.recipe.parsing import load_recipe
from slimplus.utils import machine
from slimplus.utils.errors import PREEMPTED, InputError
from tests.support.models import ModelMaker
from tests.support.recipes import SMALL

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Budget(bits=2, samples=8, sequence_length=32, epochs=2, end_to_end_epochs=3, seed=0)
RECIPES = {method: load_recipe(["recipe=smollm2_135m_2bit_best", *BUDGET.keys(method)]) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe_of_its_own(method: str) -> None:
    recipe = RECIPES[method]
    assert recipe.quantization.bits == 2
    assert recipe.end_to_end.epochs == (3 if METHODS[method].after else 0)
    same = [name for name, other in RECIPES.items() if other == recipe]
    named = {"AutoRound", "uniform, rounding"}, {FULL, "slimplus"}  # the first of each pair makes nothing of its own
    assert set(same) in ({method}, *named)


def test_a_row_is_known_by_its_settings() -> None:
    row = BUDGET.row("slimplus", "text.txt")
    assert identity(row) == identity(json.loads(json.dumps(row | {"perplexity": {"text": 3.0}})))
    for other in (BUDGET.row("slimplus", "other.txt"), BUDGET.row("RTN", "text.txt"), row | {"seed": 1}):
        assert identity(other) != identity(row)


def test_a_run_of_many_keys_has_a_folder_of_its_own_that_a_file_system_takes() -> None:
    names = [
        replace(BUDGET, overrides=(*["training.loss.error=mse"] * 12, key)).folder_name("slimplus") for key in "ab"
    ]
    assert names[0] != names[1]
    assert max(map(len, names)) + len(".copy") <= 255


def measured(method: str, seed: int, perplexity: float, **values: Any) -> dict[str, Any]:
    budget = Budget(2, 8, 32, 2, 3, seed)
    figures = {
        "average_bits": 2.0,
        "bits_per_weight": 2.375,
        "seconds": {"full_precision": 500.0, "blocks": 60.0},
        "peak_memory_bytes": 2e9,
    }
    return budget.row(method, "text.txt") | figures | {"perplexity": {"wiki": perplexity}} | values


def test_the_table_gives_seeds_by_mean_and_spread_and_budgets_apart() -> None:
    full = {"method": FULL, "overrides": [], "perplexity": {"wiki": 20.83, "python": 9.9}}
    rows = [full, measured("slimplus", 0, 50.0), measured("RTN", 0, 743157.2), measured("slimplus", 1, 52.0)]
    rows.append(measured("slimplus", 0, 30.0, bits=3))
    two, three = table(rows).split("\n\n3 bits")
    assert "| full precision | 20.83 | 9.90 | 16 | 16 |  |  |" in two
    assert "| slimplus | 51.00 ± 1.41 (2 seeds) |  | 2.000 | 2.375 | 1 | 2.0 GB |" in two
    assert "| RTN | 743,157 |  |" in two
    assert "| slimplus | 30.00 |" in three
    assert "RTN" not in three


def test_the_table_counts_steps_not_windows() -> None:
    assert "8 windows of 32 tokens of text.txt, 16 steps a block" in table([measured("slimplus", 0, 50.0)])
    larger = measured("slimplus", 0, 50.0, overrides=["training.batch_size=4"])
    assert "8 windows of 32 tokens of text.txt, 4 steps a block" in table([larger])


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds its parts beside itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))
    return importlib.import_module("run")


def test_another_text_joins_the_row_of_the_same_run(quality: ModuleType, tmp_path: Path) -> None:
    file, row = tmp_path / "quality.json", measured("slimplus", 0, 50.0, machine={"commit": "a"})
    quality.keep(row, file)
    quality.keep(row | {"perplexity": {"python": 99.0}}, file)
    (both,) = json.loads(file.read_text())["rows"]
    assert both["perplexity"] == {"wiki": 50.0, "python": 99.0}
    quality.keep(row | {"perplexity": {"python": 98.0}, "machine": {"commit": "b"}}, file)  # of a run made anew
    (new,) = json.loads(file.read_text())["rows"]
    assert new["perplexity"] == {"python": 98.0}


def test_a_method_that_does_not_take_the_keys_is_named(quality: ModuleType) -> None:
    budget = replace(BUDGET, overrides=("quantization.size_bytes=1000000",))
    quality.check_keys(["slimplus", "slimplus, end to end"], budget)
    with pytest.raises(InputError, match=r"RTN: quantization\.size_bytes: needs .*; leave RTN out of --methods"):
        quality.check_keys(["slimplus", "RTN"], budget)
    quality.check_keys(["AutoRound"], replace(BUDGET, overrides=("quantization.group_size=32",)))
    with pytest.raises(InputError, match=r"AutoRound: quantization\.scale_bits=8 does not apply; leave AutoRound out"):
        quality.check_keys(["slimplus", "AutoRound"], replace(BUDGET, overrides=("quantization.scale_bits=8",)))


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.title)
def test_every_line_of_the_figure_was_measured_and_slimplus_loses_least(ladder: Ladder) -> None:
    rungs = measured_rungs(json.loads(RESULTS.read_text())["rows"], ladder, TEXT)
    assert [rung for rung, _, _ in rungs] == list(ladder.rungs)
    losses = {rung.label: perplexity for rung, perplexity, _ in rungs if rung.bits == 2}
    assert min(losses, key=losses.__getitem__) == "slimplus"
    assert all(stored > rung.bits for rung, _, stored in rungs)


def test_a_line_of_the_figure_is_the_mean_over_seeds_at_its_own_budget() -> None:
    ladder = Ladder(
        "title", samples=8, sequence_length=32, epochs=2, rungs=(Rung("RTN", "RTN"), Rung("4", "slimplus", 4))
    )
    rows = [measured("RTN", 0, 50.0), measured("RTN", 1, 52.0), measured("RTN", 0, 9.0, samples=16)]
    rows += [measured("RTN", 0, 9.0, overrides=["quantization.scale_bits=8"]), measured("slimplus", 0, 9.0)]
    assert measured_rungs(rows, ladder, "wiki") == [(ladder.rungs[0], 51.0, 2.375)]
    assert measured_rungs(rows, ladder, "python") == []


def test_the_figure_shows_the_value_of_every_line_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    full = {"method": FULL, "overrides": [], "perplexity": {"wiki": 20.83}}
    budget = {"samples": 64, "sequence_length": 256, "epochs": 8}
    rows = [full, measured("GPTQ", 0, 4939.1, **budget), measured("AutoRound", 0, 83.42, **budget)]
    plot(rows, "wiki", tmp_path / "figure.svg", DARK)
    figure = (tmp_path / "figure.svg").read_text()
    for shown in ("20.8", "GPTQ", "4,939", "AutoRound", "83.4", "2.38"):
        assert f">{shown}<" in figure
    assert "SliM-LLM" not in figure
    assert DARK.text in figure
    assert DARK.background not in figure  # transparent


def side_by_side(text: Path, model: Path, folder: Path, *methods: str) -> list[str | Path]:
    return [
        sys.executable,
        ROOT / "benchmarks" / "quality" / "run.py",
        *("--methods", *methods),
        *("--calibration", text, "--evaluation", f"first={text}", "second=offline"),
        *("--samples", "8", "--sequence-length", "32", "--epochs", "2", "--end-to-end-epochs", "1"),
        *("--runs", folder / "runs", "--results", folder / "quality.json"),
        *("--keys", *(key for key in SMALL if key.startswith(("model", "data.e", "quantization.g", "trainer")))),
        f"model.path={model}",
    ]


@pytest.mark.slow
def test_methods_side_by_side(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    methods = [
        FULL,
        "RTN",
        "slimplus, end to end",
        "slimplus",
    ]  # what is trained end to end is made first, asked for or not

    def compare(*names: str) -> tuple[str, list[dict[str, Any]]]:
        command = side_by_side(text_file, make_model("llama"), tmp_path, *names)
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        return process.stdout, json.loads((tmp_path / "quality.json").read_text())["rows"]

    compare(*methods[:2])
    (first,) = tmp_path.glob("runs/*/RTN*")
    made = (first / "packed" / "model.safetensors").stat().st_mtime_ns
    printed, rows = compare(*methods[1:])
    assert [row["method"] for row in rows] == methods
    assert (first / "packed" / "model.safetensors").stat().st_mtime_ns == made
    full, *others = rows
    for row in others:
        assert row["average_bits"] == 2
        assert row["perplexity"].keys() == full["perplexity"].keys() == {"first", "second"}
        assert row["machine"]["commit"]
    assert len({row["perplexity"]["second"] for row in rows}) == len(rows)  # no model is measured twice
    assert "second" in printed


def test_sigterm_ends_the_run_in_progress_as_well(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    command = side_by_side(text_file, make_model("llama"), tmp_path, "slimplus")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert any("block" in line for line in process.stderr or ())  # train.py's bar: it is at work
        process.terminate()
        assert process.wait(60) == PREEMPTED
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not (tmp_path / "quality.json").exists()


def test_a_run_that_is_refused_says_why(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    command = [*side_by_side(text_file, make_model("llama"), tmp_path, "slimplus"), "training.batch_size=3"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "data.samples: 8 windows are no whole number of steps of 3" in process.stderr
    assert process.stderr.endswith("slimplus: its run ended with status 2; its message above says why\n")
    assert "Traceback" not in process.stderr


def test_shapes_of_large_models_are_measured_without_their_weights(tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"
    sizes = ("--shapes", "tiny", "--samples", "32", "--sequence-length", "32", "--steps", "5", "--group-size", "16")
    command: list[str | Path] = [sys.executable, ROOT / "benchmarks" / "block_shapes.py", *sizes, "--output", file]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (row,) = json.loads(file.read_text())["rows"]
    assert row["seconds_block"] > row["seconds_calibration"] + 4 * 32 * row["seconds_step"]
    assert "| tiny |" in printed


def test_the_machine_names_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GPUS", tmp_path)
    assert machine.describe_machine()["gpus"] == []
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / address).mkdir()
        (tmp_path / address / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n")
    assert machine.describe_machine()["gpus"] == 2 * ["NVIDIA H100 80GB HBM3"]
