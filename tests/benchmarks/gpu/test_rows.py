"""Rows of measurements that survive the end of a phase."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import rows as module
from benchmarks.gpu.rows import DeadlinePassed, Rows


def open_rows(file: Path, seconds: float = 60, strict: bool = False) -> Rows:
    return Rows(file, {"gpu": "none"}, time.monotonic() + seconds, strict)


def never() -> dict[str, Any]:
    raise AssertionError("measured again")


def failing() -> dict[str, Any]:
    raise RuntimeError("an illegal memory access")


def test_rows_are_on_the_disk_at_once_and_kept_by_a_later_call(tmp_path: Path) -> None:
    file = tmp_path / "gpu" / "phase.json"
    open_rows(file).measure({"tokens": 1, "rows": (4, 5)}, lambda: {"seconds": 2.0})
    content = json.loads(file.read_text())
    assert (content["complete"], content["machine"]) == (False, {"gpu": "none"})
    again = open_rows(file)
    assert again.measure({"tokens": 1, "rows": (4, 5)}, never)["seconds"] == 2.0
    again.measure({"tokens": 2, "rows": (4, 5)}, lambda: {"seconds": 3.0})
    again.write(complete=True)
    content = json.loads(file.read_text())
    assert [row["seconds"] for row in content["rows"]] == [2.0, 3.0]
    assert content["complete"]


def test_rows_of_other_kernels_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "phase.json"
    open_rows(file).measure({"tokens": 1}, lambda: {"seconds": 2.0})
    monkeypatch.setattr(module, "kernels_fingerprint", lambda: "another")
    assert open_rows(file).measure({"tokens": 1}, lambda: {"seconds": 1.0})["seconds"] == 1.0


def test_a_failure_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "phase.json"
    row = open_rows(file).measure({"tokens": 1}, failing)
    assert row["failure"] == "RuntimeError: an illegal memory access"
    assert "failure" in json.loads(file.read_text())["rows"][0]
    assert open_rows(file).measure({"tokens": 1}, lambda: {"seconds": 1.0})["seconds"] == 1.0


def test_a_failure_ends_a_rehearsal(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="illegal"):
        open_rows(tmp_path / "phase.json", strict=True).measure({"tokens": 1}, failing)


def test_nothing_is_measured_after_the_deadline(tmp_path: Path) -> None:
    file = tmp_path / "phase.json"
    open_rows(file).measure({"tokens": 1}, lambda: {"seconds": 2.0})
    late = open_rows(file, seconds=-1)
    assert late.measure({"tokens": 1}, never)["seconds"] == 2.0
    with pytest.raises(DeadlinePassed, match="no time was left for"):
        late.measure({"tokens": 2}, never)
