"""The watchdog of a job: when one process dies, the others end within seconds, and one of them says why."""

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

INTERVAL = 0.5  # seconds between two checks
GRACE = 10.0  # seconds that a process has to end by itself once another process has ended


@contextmanager
def watched(fabric: Fabric) -> Iterator[None]:
    """End all processes of the job soon after one of them dies, for as long as this context lasts.

    Otherwise a collective would wait half an hour for the dead process. The first process watches the processes that it
    launched, and every other process watches its parent. Lightning watches the launched processes only, and kills the
    whole job without a message.

    Args:
        fabric: the processes of the job.

    Raises:
        TemporaryFailure: if the work failed because a process died.
        InputError: if that process had ended because of its input.
    """
    launched: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    children, parent = list(launched), os.getppid()
    launched.clear()  # Lightning's observer of these processes ends with the list
    ended = threading.Event()
    if fabric.world_size > 1:
        threading.Thread(target=_watch, args=(children, parent, ended), daemon=True, name="watch").start()
    try:
        yield
    except RuntimeError as error:  # a collective raises it when its connection breaks
        deadline = time.monotonic() + GRACE  # on a busy machine, a failing process takes seconds to end
        while fabric.world_size > 1 and time.monotonic() < deadline:
            if os.getppid() != parent:
                os._exit(TRY_AGAIN)  # the first process has given the reason
            if lost := _lost(children):
                raise (InputError if lost[1] == BAD_INPUT else TemporaryFailure)(_sentence(*lost)) from error
            time.sleep(INTERVAL / 4)
        raise
    finally:
        ended.set()


def _lost(children: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Return local rank and exit status of a failed child, preferably one that has given the reason itself."""
    failed = [(rank, child.returncode) for rank, child in enumerate(children, 1) if child.poll()]
    return min(failed, key=lambda found: found[1] != BAD_INPUT, default=None)


def _sentence(rank: int, status: int) -> str:
    """Return an error message on the child of a local rank that ended with an exit status."""
    if status == BAD_INPUT:
        return f"process {rank} of this machine ended because of its input; its message above names the remedy"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"process {rank} of this machine {how}; the job cannot go on without it"


def _watch(children: list[subprocess.Popen[bytes]], parent: int, ended: threading.Event) -> None:
    """Wait in a thread until a child or the parent ends before the work has, then end this process and its children."""
    while not (lost := _lost(children)):
        if os.getppid() != parent:
            os._exit(TRY_AGAIN)
        if ended.wait(INTERVAL):
            return
    noticed = ended.wait(GRACE)  # usually the main thread notices as well, and raises an error of its own
    for child in children:
        child.kill()
    if noticed:
        return
    rank, status = lost
    sys.stderr.write(f"{_sentence(rank, status)}\n")
    sys.stderr.flush()
    os._exit(status if status in (PREEMPTED, BAD_INPUT) else TRY_AGAIN)
