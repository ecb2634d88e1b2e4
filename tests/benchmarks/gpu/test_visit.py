"""The visit to a GPU, rehearsed without one: every phase runs at tiny sizes and writes its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import visit
from tests.support.processes import ROOT

pytest.importorskip("triton")

SLOW = ("compile", "blocks", "deepspeed", "calibration")
"""Phases that start processes of their own."""
QUICK = tuple(phase for phase in visit.FUNCTIONS if phase not in SLOW)
PRODUCT = {
    *("shape", "bits", "tokens", "dtype", "launch", "registers", "programs", "slots", "seconds", "bytes"),
    *("of_ceilings", "relative_error", "predicted"),
}
"""What a row says of a product."""


def rehearse(folder: Path, skipped: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a rehearsal without some phases, each of which must be complete."""
    skip = [part for phase in skipped for part in ("--skip", phase)]
    done = call("--cpu-rehearsal", "--output", str(folder), *skip)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.stem: json.loads(file.read_text()) for file in (folder / "rehearsal").glob("*.json")}
    assert all(content["complete"] for content in files.values() if "complete" in content)
    return {name: content["rows"] for name, content in files.items() if "rows" in content}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.visit", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_rehearsal_writes_the_rows_of_every_phase(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, SLOW)
    assert rows.keys() == set(QUICK)
    assert all(rows.values())
    for row in (*rows["splits"], *rows["tune"], *rows["products"]):
        if row.get("launch"):
            assert row.keys() >= PRODUCT
            assert row["seconds"].keys() == {"median", "p10", "p90"}
            assert row["of_ceilings"].keys() == {"memcpy", "triton copy", "triton read", "memcpy, no graph"}
            assert row["predicted"]["total"] > 0
    table = json.loads((tmp_path / "rehearsal" / "rehearsal.json").read_text())
    assert table["launches"]["128+128x256 g128"].keys() == {"8"}
    assert any(row.get("tuned") for row in rows["products"])


@pytest.mark.slow
def test_the_rehearsal_runs_what_takes_processes_of_its_own(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, QUICK)
    assert rows.keys() == set(SLOW)
    assert rows["compile"][0]["registers"] > 0
    assert rows["compile"][0]["spills"] == 0
    assert rows["deepspeed"][0]["same_bytes"]
    assert rows["calibration"][0]["perplexity"]
    assert rows["blocks"][0]["seconds_step"] > 0


def test_without_a_gpu_a_call_says_so() -> None:
    done = call("--call", "1")
    assert done.returncode == 2
    assert "PyTorch finds no GPU; --cpu-rehearsal runs without one" in done.stderr


def test_every_call_ends_within_ten_minutes() -> None:
    for phases in visit.CALLS.values():
        assert sum(phases.values()) + visit.GRACE * len(phases) <= 600
    assert {phase for phases in visit.CALLS.values() for phase in phases} == visit.FUNCTIONS.keys()
