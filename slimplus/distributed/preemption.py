"""Pre-emption: SIGTERM and SIGUSR1 end a run at the next point from which another start can resume it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGTERM comes before a shutdown, SIGUSR1 from SLURM's option --signal


class Preempted(BaseException):
    """Exit of a run that was asked to end; like KeyboardInterrupt it is no error, and finished work is kept.

    Attributes:
        signal: the signal that asked for the end.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class Preemption:
    """Context that handles the signals: each raises `Preempted` at once, or later if it arrives within `deferred`.

    Lightning's own handlers are not used: they run in the middle of a step, and only while a Trainer fits.

    Attributes:
        received: the first signal that has arrived, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python allows no other thread to do this
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:  # a second signal must not interrupt the exit
            self.received = signal.Signals(number)
            if not self._deferred:
                raise Preempted(self.received)

    def share(self, received: signal.Signals) -> None:
        """Record a signal that another process of the job has received, so that this process ends as well."""
        self.received = self.received or received

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold `Preempted` back until the end of this context, while the work inside reads `received` itself.

        Raises:
            Preempted: at the end of the context, if a signal has arrived.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Preempted(self.received)


def requeue() -> str | None:
    """Ask SLURM to queue this job again; only the first process of a SLURM job asks.

    Returns:
        A sentence on what came of it, or None if this process does not ask.
    """
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    # `srun --kill-on-bad-exit` sends SIGTERM once another process has ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"SLURM job {job} could not be queued again ({error}): queue it yourself"
    return f"SLURM job {job} is queued again"
