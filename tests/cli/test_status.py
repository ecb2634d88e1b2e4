"""`slimplus status`: what it says of a run that works, has ended or is lost."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slimplus.cli.main import main
from slimplus.cli.status import describe
from slimplus.utils.progress import FILE
from tests.support.processes import ROOT, run_console
from tests.support.recipes import QAT, Arguments

NOW = 1_800_000_000.0
PROGRESS: dict[str, Any] = {
    **{"status": "running", "stage": "blocks", "unit": "block", "part": 12, "parts": 30, "step": 40, "steps": 64},
    **{"loss": 0.0123456, "seconds_left": 2040.0, "memory": {"": 1_230_000_000, " on the device": 4_560_000_000}},
    **{"started": NOW - 1000, "updated": NOW - 3, "pid": os.getpid(), "host": platform.node()},
}


def test_a_run_that_works() -> None:
    rows = describe(PROGRESS, NOW)
    assert rows.pop("started").endswith(", 17 min of work")
    assert rows == {
        "status": f"running, process {os.getpid()} on {platform.node()}",
        "stage": "blocks",
        "block": "12 of 30",
        "step": "40 of 64",
        "loss": "0.01235",
        "time left": "about 34 min to the end of the run",
        "memory": "1.23 GB, 4.56 GB on the device",
    }


def test_a_run_that_has_ended() -> None:
    assert describe(PROGRESS | {"status": "ended by Preempted: SIGTERM"}, NOW)["status"].endswith("SIGTERM, 3 s ago")
    finished = describe(PROGRESS | {"status": "finished", "seconds_left": None}, NOW + 597)
    assert finished["status"] == "finished, 10 min ago"
    assert set(finished) == {"status", "memory", "started"}


def test_a_run_that_is_lost_or_silent() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent has not asked for its status
    assert describe(PROGRESS | {"pid": child.pid}, NOW)["status"].startswith("lost: ")
    child.wait()
    gone = describe(PROGRESS | {"pid": child.pid}, NOW)["status"]
    assert gone.startswith(f"lost: process {child.pid} on ")
    elsewhere = PROGRESS | {"host": "another"}
    assert describe(elsewhere, NOW)["status"] == f"running, process {os.getpid()} on another"
    assert describe(elsewhere, NOW + 300)["status"].startswith("lost: ")
    assert describe(PROGRESS, NOW + 300)["status"].endswith(", without a sign of life for 5 min")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "progress.json cannot be read (No such file or directory); give the run_dir" in capsys.readouterr().err
    for damaged in ("{", "[]", "{}"):
        (tmp_path / FILE).write_text(damaged)
        assert main(["status", str(tmp_path)]) == 2
        assert "is damaged" in capsys.readouterr().err


def test_another_process_sees_a_run_at_work_killed_and_finished(arguments: Arguments, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command: list[str | Path] = [sys.executable, ROOT / "train.py", *arguments(folder, *QAT, "training.epochs=4000")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 280
    while "time left" not in (said := run_status(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    running.kill()
    assert said["status"] == f"running, process {running.pid} on {platform.node()}"
    assert said["block"] == "1 of 2"
    assert said["step"].endswith(" of 32000")
    assert "to the end of the run" in said["time left"]
    running.communicate()
    assert run_status(folder)["status"].startswith("lost: ")


def run_status(folder: Path) -> dict[str, str]:
    lines = run_console("status", str(folder)).stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_a_finished_run(finished: Path) -> None:
    assert run_status(finished)["status"].startswith("finished, ")
