"""Jobs of several processes: one is lost, one is told to end, one has a bad step; it is the job's affair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import faulty
from tests.support.recipes import Arguments


def start(arguments: list[str], **faults: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, faulty.__file__, json.dumps(faults), *arguments],
        env=faulty.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Once every process of the job has ended: each of them holds the pipe."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


@pytest.mark.slow
def test_one_of_two_deepspeed_processes_is_lost(arguments: Arguments, tmp_path: Path) -> None:
    """In the end it has the bytes that one process gives, to which nothing happened."""
    folder = tmp_path / "lost"
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=deepspeed_stage_2")
    two = arguments(folder, *devices, "training.batch_size=2", "trainer.checkpoint_seconds=0")
    began = time.monotonic()
    status, said = finish(start(two, rank=1, signal_batch=[3, signal.SIGKILL]))
    assert status == 75, said
    assert "process 1 of this machine was killed by SIGKILL; the job cannot go on without it; the same" in said
    assert time.monotonic() - began < 120
    status, said = finish(start(two, rank=0, signal_batch=[3, signal.SIGKILL]))
    assert status == -signal.SIGKILL, said
    status, said = finish(start(two, rank=1, signal_batch=[3, signal.SIGUSR1]))  # only one is told
    assert status == 143, said
    assert "Ended by SIGUSR1" in said
    assert "Ended by SIGTERM" not in said
    status, said = finish(start(two))
    assert status == 0, said
    whole = tmp_path / "whole"
    assert finish(start(arguments(whole, "training.batch_size=2")))[0] == 0
    for name in ("packed/model.safetensors", "packed/config.json", "allocation.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_bad_step_of_one_process_is_skipped_by_all(arguments: Arguments, tmp_path: Path, strategy: str) -> None:
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}", "training.batch_size=2")
    status, said = finish(start(arguments(tmp_path / "run", *devices), rank=1, nan_steps=[2, *range(9, 20)]))
    assert status == 0, said
    first, second = json.loads((tmp_path / "run/metrics.json").read_text())["blocks"]
    assert first["skipped_steps"] == 1
    assert first["loss"] < first["calibrated_loss"]
    assert second["events"][-1].endswith("the calibrated quantizers are kept")


@pytest.mark.slow
def test_bad_input_that_one_process_finds_ends_the_job_as_bad_input(arguments: Arguments, tmp_path: Path) -> None:
    """And not as a loss that passes, after which a scheduler would start the job again, and again."""
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", "training.batch_size=2")
    status, said = finish(start(arguments(tmp_path / "run", *devices), rank=1, largest_batch=0))
    assert status == 2, said
    assert "out of device memory while training on one window; give trainer.strategy=deepspeed_stage_3" in said
    assert "process 1 of this machine ended because of its input; its message above names the remedy" in said
    assert "the same command" not in said
