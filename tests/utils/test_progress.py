"""Progress: the time that is left of all stages, the line on a terminal, the lines of a log, and the file."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slimplus.utils import progress as module
from slimplus.utils.progress import ENOUGH, FILE, FINISHED, RUNNING, Pace, Progress, State
from tests.support.processes import ROOT

WORK = {"text": 10.0, "blocks": 100.0, "end": 50.0}


class Clock:
    """A clock that stands still but for `tick`."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        self.seconds += seconds


@given(st.floats(0.1, 100), st.floats(0.05, 1), st.lists(st.floats(0.1, 1000), min_size=3, max_size=3))
def test_with_a_constant_pace_the_time_left_is_exact(pace: float, share: float, work: list[float]) -> None:
    assume(work[0] > ENOUGH * sum(work))
    clock = Clock()
    estimate = Pace(dict(zip(WORK, work, strict=True)), clock)
    estimate.begin()
    assert estimate.left("text", 0.0) is None, "nothing is known yet"
    clock.tick(pace * work[0])
    estimate.end("text")
    estimate.begin()
    assert estimate.left("blocks", 0.0) == pytest.approx(pace * (work[1] + work[2]))
    clock.tick(pace * work[1] * share)
    assert estimate.left("blocks", share) == pytest.approx(pace * (work[1] * (1 - share) + work[2]))


def test_a_stage_that_takes_longer_than_expected_counts_by_its_own_pace() -> None:
    clock = Clock()
    estimate = Pace(WORK, clock)
    estimate.begin()
    clock.tick(10)  # one second for each unit
    estimate.end("text")
    estimate.begin()
    clock.tick(200)  # four for each
    # Half of the blocks are left, and then 50 units at the mean pace of 210 seconds for 60 units.
    assert estimate.left("blocks", 0.5) == pytest.approx(200 + 50 * 210 / 60)
    assert estimate.left("unknown", 0.5) is None


def test_a_stage_with_next_to_no_work_says_nothing_about_the_rest() -> None:
    clock = Clock()
    estimate = Pace({"text": 1.0, "blocks": 1000.0}, clock)
    estimate.begin()
    clock.tick(20)  # of which most is loading
    estimate.end("text")
    estimate.begin()
    assert estimate.left("blocks", 0.0) is None
    clock.tick(40)
    assert estimate.left("blocks", 0.04) == pytest.approx(24 * 40)


def test_what_was_found_says_nothing_about_what_is_to_come() -> None:
    clock = Clock()
    estimate = Pace(WORK, clock)
    estimate.begin()
    clock.tick(1)
    estimate.discount(0.8)
    assert estimate.left("blocks", 0.8) is None
    clock.tick(30)
    assert estimate.left("blocks", 0.9) == pytest.approx(30 + 50 * 30 / 10)
    clock.tick(30)
    estimate.end("blocks")
    estimate.begin()
    assert estimate.left("end", 0.0) == pytest.approx(50 * 60 / 20)


def test_a_state_in_words() -> None:
    assert str(State("full_precision")) == "full precision"
    state = State("blocks", "block", 3, 30, 16, 64, 0.0123)
    assert str(state) == "blocks, block 3 of 30, step 16 of 64, loss 0.0123"
    assert state.share == pytest.approx(2.25 / 30)
    assert State("end_to_end", step=1, steps=4).share == 0.25
    assert State("blocks", part=31, parts=30).share == 1.0


def read(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / FILE).read_text())
    return content


def work_until_interrupted(folder: Path) -> None:
    with Progress(shows=True) as progress:
        assert not (folder / FILE).exists()
        progress.open(folder / FILE, {"blocks": 1.0})
        progress.begin("blocks")
        for _ in progress.track("ab"):
            progress.step(3, 4, 0.5)
            expected = {"status": RUNNING, "stage": "blocks", "part": 1, "parts": 2, "step": 3, "steps": 4, "loss": 0.5}
            while not (folder / FILE).exists() or read(folder).get("step") != 3:
                time.sleep(0.01)
            found = read(folder)
            assert {name: found[name] for name in expected} == expected
            assert found["pid"] == os.getpid()
            raise KeyboardInterrupt


def test_the_file_tells_where_the_job_stands_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    with pytest.raises(KeyboardInterrupt):
        work_until_interrupted(tmp_path)
    assert read(tmp_path)["status"] == "ended by KeyboardInterrupt"
    with Progress(shows=True) as progress:
        progress.open(tmp_path / FILE, {})
    assert read(tmp_path)["status"] == FINISHED
    assert os.listdir(tmp_path) == [FILE]
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_only_the_first_process_shows_and_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slimplus")
    with Progress(shows=False) as progress:
        progress.open(tmp_path / FILE, {"blocks": 1.0})
        progress.begin("blocks")
        assert list(progress.track([1, 2])) == [1, 2]
    assert not os.listdir(tmp_path)
    assert not caplog.text


def test_a_folder_that_cannot_be_written_to_stops_no_job(tmp_path: Path) -> None:
    with Progress(shows=True) as progress:
        progress.open(tmp_path / "missing" / FILE, {})
        progress.begin("blocks")


def test_without_a_terminal_the_log_gets_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "slimplus")
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    with Progress(shows=True) as progress:
        progress._pace = Pace({"blocks": 1.0}, clock)
        progress.begin("blocks")
        for _ in progress.track(range(4)):
            for step in range(1, 5):
                clock.tick(5)
                progress.step(step, 4, 1.0)
    said = [message.rpartition(", ")[0] for message in caplog.messages]  # the last part is the memory
    assert said == [
        "blocks",
        "blocks, block 2 of 4, 60 s left",
        "blocks, block 3 of 4, 40 s left",
        "blocks, block 4 of 4, 20 s left",
    ]


SHOWN = """
import logging, sys, time
from slimplus.cli.train import _Messages
from slimplus.utils.progress import Progress
logging.basicConfig(format="%(message)s", handlers=[_Messages()])
with Progress(shows=True) as progress:
    progress.begin("blocks")
    for _ in progress.track([1, 2]):
        time.sleep(0.4)
    logging.warning("a warning")
    time.sleep(0.4)
sys.stdout.write("the summary")
"""


def test_on_a_terminal_one_line_is_shown_below_the_messages() -> None:
    """In a pseudo terminal, whose output is read as a user would see it."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], env=environment, stderr=theirs, stdout=subprocess.PIPE, timeout=120, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.stdout == b"the summary"
    assert "blocks, block 1 of 2" in shown
    assert "blocks, block 2 of 2" in shown
    assert shown.count("a warning\r\n") == 1
    lines = shown.split("\n")
    assert len(lines) == 3, "the line is drawn over itself: only the warning and the end begin a new one"
