"""Pre-emption: SIGTERM and SIGUSR1 end a run at the next point from which it can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a machine that is about to go; SLURM's warning, as `--signal` asks for it


class Preempted(BaseException):
    """The run was asked to end. Like KeyboardInterrupt it is no error, and what is done is kept."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class Preemption:
    """Takes the signals while it is entered: one raises `Preempted` at once, or is kept for later within `deferred`.

    Lightning's own handlers are not used: they run in the middle of a step, and only while a Trainer fits.

    Attributes:
        received: the first signal, if one came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # no other may install handlers
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:  # one is enough; a second must not interrupt the way out
            self.received = signal.Signals(number)
            if not self._deferred:
                raise Preempted(self.received)

    def share(self, received: signal.Signals) -> None:
        """Note that another process of the job was asked to end: this one must as well."""
        self.received = self.received or received

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context the work looks at `received` itself; at its end a signal is raised as usual."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Preempted(self.received)


def requeue() -> str | None:
    """Ask SLURM, from the first of the job's processes, to queue this job again; what came of it, if there is one."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    # `srun --kill-on-bad-exit` sends it once another process has ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"SLURM job {job} could not be queued again ({error}): queue it yourself"
    return f"SLURM job {job} is queued again"
