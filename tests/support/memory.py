"""The anonymous memory of a run, which no file holds, by stages; run as a program in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import ROOT

STATUS = Path("/proc/self/status")
SECONDS = 0.01  # between two samples
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What makes glibc give freed memory back to the system, instead of keeping it for what is asked for next."""


def anonymous_bytes() -> int:
    """The memory of this process that cannot be read again from a file."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def peaks_of_run(arguments: list[str], timeout: float = 600) -> dict[str, int]:
    """Stage → most bytes of anonymous memory during it, of a run in a process of its own."""
    command = [sys.executable, "-m", "tests.support.memory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | AT_ONCE, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main(arguments: list[str]) -> None:
    """Runs a recipe, and writes the peaks of its stages as JSON."""
    from slimplus.pipeline import memory
    from slimplus.pipeline import run as pipeline
    from slimplus.recipe.parsing import load_recipe
    from slimplus.run_dir.metrics import Metrics

    memory.SMALL_PART = 0.0  # memory is short, so that none is spent to save time
    current, peaks, ended = [""], dict[str, int](), threading.Event()
    original = Metrics.stage

    @contextmanager
    def stage(self: Metrics, name: str) -> Iterator[None]:
        with original(self, name):
            current[0] = name
            yield
        current[0] = ""

    def watch() -> None:
        while not ended.is_set():
            peaks[current[0]] = max(peaks.get(current[0], 0), anonymous_bytes())
            time.sleep(SECONDS)

    Metrics.stage = stage  # type: ignore[method-assign]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        pipeline.run(load_recipe(arguments))
    finally:
        ended.set()
        watcher.join()
    sys.stdout.write(json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
