"""Runs that calibrate on text which the model writes: interrupted, resumed, mixed, on several processes, refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimplus.pipeline import self_text
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.section import RecipeError
from slimplus.utils.errors import InputError
from tests.support import faulty
from tests.support.models import ModelMaker
from tests.support.processes import ROOT, run_console
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run

OWN = ("data.calibration=self", "quantization.method=rtn", "data.generation.batch_size=2")


@pytest.fixture(scope="module")
def own_text(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that calibrated on the model's own text."""
    folder = tmp_path_factory.mktemp("own") / "run"
    run(arguments(folder, *OWN))
    return folder


def written(folder: Path) -> torch.Tensor:
    return load_file(folder / "tokens/self.safetensors")["tokens"]


def windows(folder: Path) -> torch.Tensor:
    return load_file(folder / "tokens/calibration.safetensors")["tokens"]


def test_the_windows_are_those_that_the_model_wrote(own_text: Path) -> None:
    assert written(own_text).shape == (8, 32)
    assert (written(own_text)[:, 0] == 0).all(), "BOS"
    assert len(written(own_text).unique(dim=0)) == 8
    assert sorted(windows(own_text).tolist()) == sorted(written(own_text).tolist())
    assert read_metrics(own_text)["seconds"]["calibration_text"] > 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faulty.Server]:
    server = faulty.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def test_a_killed_run_keeps_the_batches_and_ends_with_the_same_text(
    arguments: Arguments, server: faulty.Server, own_text: Path, tmp_path: Path
) -> None:
    folder, found, event = tmp_path / "run", set(), 21
    while True:
        status, said = server(arguments(folder, *OWN), signal_at=[event, signal.SIGKILL])
        assert status in (0, -signal.SIGKILL), said
        file = folder / "tokens/self.safetensors"
        found.add(len(written(folder)) if file.is_file() else 0)
        if not status:
            break
        event += 9
    assert {2, 4, 6} & found, "killed between two batches"
    assert file.read_bytes() == (own_text / "tokens/self.safetensors").read_bytes()
    assert torch.equal(windows(folder), windows(own_text))


def test_the_end_to_end_training_has_text_of_its_own_written(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments(tmp_path, *OWN, "end_to_end.epochs=1", "end_to_end.batch_size=2", "end_to_end.tokens=384"))
    assert windows(tmp_path).shape == (8, 32)
    longer = load_file(tmp_path / "tokens/end_to_end_self.safetensors")["tokens"]
    assert longer.shape == (12, 32)
    assert torch.equal(longer[:8], written(tmp_path)), "the same beginnings and draws"
    drawn = load_file(tmp_path / "tokens/end_to_end.safetensors")["tokens"]
    assert sorted(drawn.tolist()) == sorted(longer.tolist())


def test_what_is_written_is_not_written_again(
    arguments: Arguments, own_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seeds, exact = tmp_path / "run", list[int](), self_text.write_windows

    def write_windows(*given: Any) -> torch.Tensor:
        seeds.append(given[-1])
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return exact(*given)

    monkeypatch.setattr(self_text, "write_windows", write_windows)
    with pytest.raises(KeyboardInterrupt):
        run(arguments(folder, *OWN))
    assert len(written(folder)) == 4
    run(arguments(folder, *OWN))
    assert seeds[2] == seeds[3]
    assert len(set(seeds)) == 4
    assert torch.equal(written(folder), written(own_text))
    run(arguments(folder, *OWN))
    assert len(seeds) == 5


def test_other_settings_write_another_text(arguments: Arguments, own_text: Path, tmp_path: Path) -> None:
    for number, change in enumerate(("temperature=0.5", "seed=1", "batch_size=4")):
        run(arguments(tmp_path / str(number), *OWN, f"data.generation.{change}"))
        assert not torch.equal(written(tmp_path / str(number)), written(own_text))
    with pytest.raises(InputError, match=r"data\.generation\.temperature None -> 0\.5; restore"):
        run(arguments(own_text, *OWN, "data.generation.temperature=0.5"))


def test_a_mix_of_a_text_and_the_models_own(arguments: Arguments, text_file: Path, tmp_path: Path) -> None:
    mix = f"data.calibration=[{{path: {text_file}, weight: 3}}, self]"
    prefixes = (f"data.generation.prompts={text_file}", "data.generation.prefix_tokens=5")
    run(arguments(tmp_path / "mix", *OWN, mix, *prefixes))
    own, drawn = written(tmp_path / "mix"), windows(tmp_path / "mix")
    assert own.shape == (2, 32)
    assert sum(window in own.tolist() for window in drawn.tolist()) == 2
    assert (own[:, :5] != 0).all(), "prefixes of the text in the place of BOS"
    with pytest.raises(InputError, match=r"share of 'self' of data\.samples=8 windows is none; raise its weight"):
        run(arguments(tmp_path / "none", *OWN, mix.replace("weight: 3", "weight: 300")))


@pytest.mark.slow
def test_two_processes_write_the_same_text(arguments: Arguments, own_text: Path, tmp_path: Path) -> None:
    keys = arguments(tmp_path / "run", *OWN, "trainer.devices=2", "trainer.accelerator=cpu", "data.samples=10")
    done = subprocess.run([sys.executable, ROOT / "train.py", *keys], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert torch.equal(written(tmp_path / "run")[:8], written(own_text))
    assert len(written(tmp_path / "run")) == 10


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["data.calibration=[self, self]"], "data.calibration: self stands twice in the list"),
        (["data.generation.seed=1"], "data.generation: only data.calibration=self reads it"),
        (
            ["data.calibration=self", "data.generation.prefix_tokens=4"],
            "needs a text to continue in data.generation.pr",
        ),
        (
            ["data.calibration=self", "data.generation={prompts: offline, prefix_tokens: 256}"],
            "256 tokens leave none to write of data.sequence_length=256",
        ),
        (
            ["data.calibration=self", "data.generation.temperature=0"],
            "data.generation.temperature: expected number > 0",
        ),
    ],
)
def test_wrong_keys_are_refused(keys: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(["recipe=smollm2_135m_2bit", *keys])
    assert said in str(error.value)


def test_what_cannot_be_written_is_refused_before_the_weights_are_read(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: ModelMaker
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x" * 32)
    with pytest.raises(InputError, match=r"data\.generation\.prompts: a prompt of 32 tokens \('x{16}' …\) leaves none"):
        run(arguments(tmp_path / "run", *OWN, f"data.generation.prompts={prompts}"))
    monkeypatch.setattr(self_text, "available_bytes", lambda: 100_000)
    said = r"the whole model has to be in memory at once, about \d+\.\d kB with 2 windows, of which 100\.0 kB are free"
    with pytest.raises(InputError, match=said):
        run(arguments(tmp_path / "run", *OWN))
    refused = run_console("train", *arguments(tmp_path / "run", *OWN, "data.generation.prompts=none.txt"))
    assert refused.returncode == 2
    assert refused.stderr == (
        "data.generation.prompts: there is no file 'none.txt'; give one of wikitext2, c4, ptb, pile, fineweb, "
        "redpajama, slimpajama, the-stack-smol, ultrachat, offline, or a local .txt, .jsonl, .json, .csv, .parquet "
        "file\n"
    )
    assert run_console("train", *arguments(tmp_path, "data.evaluation.path=self")).stderr.startswith(
        "data.evaluation.path: unknown text source 'self'"
    )
