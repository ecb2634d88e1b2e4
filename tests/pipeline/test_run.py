"""The whole job on tiny models: what it writes, what it skips, and what it refuses."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.processes import ROOT
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run


def test_what_a_run_writes(finished: Path, arguments: Arguments) -> None:
    metrics = read_metrics(finished)
    assert metrics["average_bits"] == 2.0
    assert metrics["bits_per_weight"] > 2.0
    assert set(metrics["perplexity"]) == {"full", "quantized"}
    assert set(metrics["seconds"]) == {"full_precision", "blocks", "export", "packed"}
    stored = sum(t.nbytes for t in load_file(finished / "packed" / "model.safetensors").values())
    assert metrics["size_bytes"] == stored
    assert metrics["compression"] == pytest.approx(metrics["full_size_bytes"] / stored)
    assert metrics["peak_memory_bytes"] > 1e8
    assert load_recipe([f"recipe={finished / 'recipe.yaml'}"]) == load_recipe(arguments(finished))
    assert "2.000" in (finished / "summary.txt").read_text()
    with (finished / "logs/csv/block_001/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["grad_norm"] for row in rows)
    assert any(row["lr-AdamW"] for row in rows)
    assert not list(finished.rglob("*.tmp"))
    assert not (finished / "checkpoints" / "block_000").exists()


def test_a_second_run_skips_what_is_done(
    finished: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}
    caplog.set_level(logging.INFO, "slimplus")
    run(arguments(finished))
    assert caplog.text.count("skipped") == 4
    assert "2 of 2" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}


def test_another_evaluation_text_is_measured_anew(
    finished: Path, arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    caplog.set_level(logging.INFO, "slimplus")
    run(arguments(copy, "data.evaluation.windows=3"))
    assert read_metrics(copy)["perplexity"] != read_metrics(finished)["perplexity"]
    assert "2 of 2" in caplog.text


def test_changed_inputs_are_refused(finished: Path, arguments: Arguments) -> None:
    changes = r"quantization\.percdamp 0\.01 -> 0\.1, seed 0 -> 1; restore them, .* resume\.force=true"
    with pytest.raises(InputError, match=rf"run_dir: .* made with other values: {changes}"):
        run(arguments(finished, "quantization.percdamp=0.1", "seed=1", "data.samples=8"))


def test_resume_never_refuses_a_used_folder(finished: Path, arguments: Arguments) -> None:
    with pytest.raises(InputError, match="is not empty"):
        run(arguments(finished, "resume=never"))


@pytest.mark.parametrize("method", ["rtn", "gptq", "slimllm"])
def test_methods_without_training(arguments: Arguments, tmp_path: Path, method: str) -> None:
    run(arguments(tmp_path / method, f"quantization.method={method}", "quantization.bits=3"))
    metrics = read_metrics(tmp_path / method)
    assert metrics["average_bits"] == 3.0
    widths = {
        width
        for group in json.loads((tmp_path / method / "allocation.json").read_text())["bits"].values()
        for width in group
    }
    assert widths == ({2, 3, 4} if method == "slimllm" else {3})


def test_a_whole_run_in_bfloat16(arguments: Arguments, make_model: ModelMaker, tmp_path: Path) -> None:
    """Biases, layer norms and tied weights included: OPT has them all."""
    run(arguments(tmp_path / "run", "trainer.precision=bf16-mixed", model=make_model("opt")))
    metrics = read_metrics(tmp_path / "run")
    assert metrics["precision"] == "bf16-mixed"
    assert metrics["average_bits"] == 2.0
    assert metrics["perplexity"]["quantized"] == pytest.approx(metrics["perplexity"]["full"], rel=0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.samples=100000", r"fewer than data\.samples=100000"),
        ("training.batch_size=3", r"8 windows are no whole number of steps of 3 .* give a multiple of 3"),
        ("training.accumulate_grad_batches=2", r"training\.batch_size: 1 windows a step cannot be shared evenly"),
        ("data.evaluation.sequence_length=200000", "200000 tokens are more than the model takes; give at most 256"),
        ("model.path=nobody/no-such-model", "cannot load 'nobody/no-such-model'"),
    ],
)
def test_bad_input_found_late_is_still_one_sentence(
    arguments: Arguments, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(arguments(tmp_path, override))


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _train(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_command(arguments: Arguments, tmp_path: Path) -> None:
    done = _train(arguments(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "average bits" in done.stdout
    assert "It writes:" in done.stdout
    for stage in ("full precision", "blocks", "export", "packed"):
        assert f"\n{stage}, " in f"\n{done.stderr}"
    for chatter in ("GPU available", "does not have many workers", "max_epochs"):
        assert done.stderr.count(chatter) <= 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(
    arguments: Arguments, make_model: ModelMaker, tmp_path: Path
) -> None:
    """Beyond the model in its stored dtype, once in memory and once as pages of its file that the kernel keeps mapped.

    One float32 copy of each block that is not freed would add as much again.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1408}
    stored_block = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)
    peaks = {}
    for blocks in (2, 8):
        folder = tmp_path / str(blocks)
        model = make_model("llama", blocks=blocks, **sizes)
        done = _train(
            arguments(folder, "data.samples=2", "quantization.group_size=128", "training.epochs=1", model=model)
        )
        assert done.returncode == 0, done.stderr
        peaks[blocks] = int(read_metrics(folder)["peak_memory_bytes"])
    assert peaks[8] - peaks[2] < 6 * stored_block * 3, peaks
