"""What becomes of a job whose processes do not all live: the others end within seconds, and one says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric import Fabric

from slimplus.utils.errors import BAD_INPUT, PREEMPTED, TRY_AGAIN, InputError, TemporaryFailure

INTERVAL, GRACE = 0.5, 10.0  # seconds between two looks, and for a process to end by itself once another has


@contextmanager
def watched(fabric: Fabric) -> Iterator[None]:
    """Within this context no process of the job outlives another: a collective would wait for it, for half an hour.

    The first process watches those it launched, and each other one watches its parent. Lightning does the former
    alone, and kills the whole job without a word.

    Raises:
        TemporaryFailure: if the work failed because a process was lost.
        InputError: if that ended because of its input.
    """
    launched: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    children, parent = list(launched), os.getppid()
    launched.clear()  # so that Lightning's observer ends
    if fabric.world_size > 1:
        threading.Thread(target=_watch, args=(children, parent), daemon=True, name="watch").start()
    try:
        yield
    except RuntimeError as error:  # what a collective raises when its connection breaks
        deadline = time.monotonic() + 4 * INTERVAL
        while fabric.world_size > 1 and time.monotonic() < deadline:
            if os.getppid() != parent:
                os._exit(TRY_AGAIN)  # the first process has said why
            if lost := _lost(children):
                raise (InputError if lost[1] == BAD_INPUT else TemporaryFailure)(_sentence(*lost)) from error
            time.sleep(INTERVAL / 4)
        raise


def _lost(children: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Rank on this machine and exit status of a child that has failed, of one that says why if there is one."""
    failed = [(rank, child.returncode) for rank, child in enumerate(children, 1) if child.poll()]
    return min(failed, key=lambda found: found[1] != BAD_INPUT, default=None)


def _sentence(rank: int, status: int) -> str:
    if status == BAD_INPUT:
        return f"process {rank} of this machine has said above what is wrong with the input"
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"process {rank} of this machine was {how}; the job cannot go on without it"


def _watch(children: list[subprocess.Popen[bytes]], parent: int) -> None:
    while not (lost := _lost(children)):
        if os.getppid() != parent:
            os._exit(TRY_AGAIN)
        time.sleep(INTERVAL)
    time.sleep(GRACE)  # usually the main thread has noticed as well, and ends in its own words
    for child in children:
        child.kill()
    rank, status = lost
    sys.stderr.write(f"{_sentence(rank, status)}\n")
    sys.stderr.flush()
    os._exit(status if status in (PREEMPTED, BAD_INPUT) else TRY_AGAIN)
