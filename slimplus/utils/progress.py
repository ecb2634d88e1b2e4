"""Where a job stands: one line on a terminal, lines in the log elsewhere, and a small file for `slimplus status`.

The time left is that of the whole job. Each stage gets an expected amount of work, in any unit; the seconds that a unit
has taken so far stand for all that is to come, and within a stage its own pace does.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from slimplus.utils.errors import named_first_line
from slimplus.utils.machine import resident_bytes
from slimplus.utils.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.live import Live

logger = logging.getLogger(__name__)

FILE = "progress.json"
RUNNING, FINISHED = "running", "finished"
HEARTBEAT = 5.0  # seconds between two writes of the file
PART_SECONDS, STEP_SECONDS = 10.0, 60.0  # at least, from a line of the log to that of another part, or another step
ENOUGH = 0.005  # share of the job's work whose pace tells of the rest: a small part may be loading more than computing
LEAST = 0.02  # share of a stage after which its own pace says more than that of the stages before it

Item = TypeVar("Item")


class Track(Protocol):
    """Iteration over the parts of a stage that tells a progress display of each."""

    def __call__(self, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items."""


def untracked(items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items, and tell nobody."""
    yield from items


@dataclass(frozen=True)
class State:
    """Where a job stands.

    Attributes:
        stage: name of the stage.
        unit: what the parts of the stage are called.
        part: number of the part at work, from 1; 0 before the first.
        parts: number of parts of the stage; 0 if it has none.
        step: number of training steps taken in the part.
        steps: number of training steps of the part; 0 if it has none.
        loss: loss of the last step.
    """

    stage: str = "start"
    unit: str = "block"
    part: int = 0
    parts: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None

    @property
    def share(self) -> float:
        """Share of the stage that is done, from 0 to 1."""
        inside = self.step / self.steps if self.steps else 0.0
        return (max(self.part - 1, 0) + inside) / self.parts if self.parts else inside

    def __str__(self) -> str:
        parts = [self.stage.replace("_", " ")]
        parts += [f"{self.unit} {self.part} of {self.parts}"] if self.parts else []
        parts += [f"step {self.step} of {self.steps}"] if self.steps else []
        return ", ".join(parts + ([] if self.loss is None else [f"loss {self.loss:.4g}"]))


@dataclass
class Pace:
    """Estimate of the time that is left.

    Attributes:
        work: stage → its expected work, in the order of the stages.
        now: the clock, in seconds.
        done: work that was done in `seconds`, in the stages before the present one.
        seconds: seconds of these stages.
        since: when the present stage began, or was last said to count from here.
        share: share of the stage that was done then.
    """

    work: Mapping[str, float]
    now: Callable[[], float] = time.monotonic
    done: float = 0.0
    seconds: float = 0.0
    since: float = field(default=0.0)
    share: float = 0.0

    def begin(self) -> None:
        """Begin a stage."""
        self.since, self.share = self.now(), 0.0

    def discount(self, share: float) -> None:
        """Leave what the stage has done so far, `share` of it, out of the estimate: it took less than its work."""
        self.since, self.share = self.now(), share

    def end(self, stage: str) -> None:
        """End a stage."""
        self.done += self.work.get(stage, 0.0) * (1 - self.share)
        self.seconds += self.now() - self.since

    def left(self, stage: str, share: float) -> float | None:
        """Return the seconds that are left after `share` of a stage, or None if nothing is known yet."""
        stages = list(self.work)
        if stage not in stages:
            return None
        later = sum(self.work[name] for name in stages[stages.index(stage) + 1 :])
        elapsed, advanced = self.now() - self.since, share - self.share
        own, known = self.work[stage] * advanced, advanced >= LEAST
        done, seconds = self.done + (own if known else 0.0), self.seconds + (elapsed if known else 0.0)
        if done <= ENOUGH * sum(self.work.values()):
            return None
        pace = seconds / done
        rest = (1 - share) * (elapsed / advanced if known else pace * self.work[stage])
        return rest + later * pace


class Progress:
    """Progress of a job, which its first process shows and writes; the others keep quiet.

    As a context it shows the job until its end, and says in the file how it ended.

    Args:
        shows: whether this process shows the progress.
        device_bytes: function that returns the bytes in use on the device, if it has memory of its own.
    """

    def __init__(self, shows: bool, device_bytes: Callable[[], int] | None = None) -> None:
        self._shows, self._device_bytes = shows, device_bytes
        self._file: Path | None = None
        self._state, self._pace = State(), Pace({})
        self._started = time.time()
        self._logged, self._ended, self._lock = 0.0, threading.Event(), threading.Lock()
        self._line: Live | None = None

    def __enter__(self) -> Progress:
        if self._shows:
            from slimplus.utils.progress_line import live_line

            self._line = live_line(self.describe)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._line is not None:
            self._line.stop()
        self._write(FINISHED if error is None else f"ended by {named_first_line(error)}")

    def open(self, file: Path, work: Mapping[str, float]) -> None:
        """Keep the progress in a file from here on.

        Args:
            file: the file, which another process may read at any time.
            work: stage → its expected work, in any unit, in the order of the stages.
        """
        self._pace = Pace(work)
        if self._shows:
            self._file = file
            threading.Thread(target=self._beat, daemon=True, name="progress").start()

    def begin(self, stage: str) -> None:
        """Say that a stage begins."""
        self._pace.begin()
        self._change(State(stage), 0.0)

    def end(self) -> None:
        """Say that the stage has ended."""
        self._pace.end(self._state.stage)

    def track(self, items: Sequence[Item], unit: str = "block") -> Iterator[Item]:
        """Yield the parts of a stage, and say which one is at work."""
        for number, item in enumerate(items, start=1):
            self.reach(number, len(items), unit)
            yield item
        self._state = replace(self._state, part=len(items) + 1)

    def reach(self, part: int, parts: int, unit: str) -> None:
        """Say which part of the stage is at work, where the parts are not at hand as items."""
        self._change(State(self._state.stage, unit, part, parts), PART_SECONDS)

    def discount(self) -> None:
        """Leave the present part of the stage out of the estimate of the time that is left: it was found."""
        self._pace.discount(self._state.part / self._state.parts)

    def step(self, step: int, steps: int, loss: float) -> None:
        """Say that a training step of the part has been taken."""
        self._change(replace(self._state, step=step, steps=steps, loss=loss), STEP_SECONDS)

    def _change(self, state: State, seconds: float) -> None:
        """Take a new state, and log it if no line shows it and the last log is `seconds` ago."""
        self._state = state
        if self._shows and self._line is None and time.monotonic() - self._logged >= seconds:
            self._logged = time.monotonic()
            logger.info("%s", self.describe())

    def describe(self) -> str:
        """Return the progress in one line."""
        state, left = self._state, self._left()
        parts = [str(state), "" if left is None else f"{format_seconds(left)} left"]
        parts += [f"{format_bytes(size)}{place}" for place, size in self._memory().items()]
        return ", ".join(filter(None, parts))

    def _left(self) -> float | None:
        return self._pace.left(self._state.stage, min(self._state.share, 1.0))

    def _memory(self) -> dict[str, int]:
        """Return the bytes in use by place: main memory (an empty name), and the device."""
        resident = resident_bytes()
        found = {} if resident is None else {"": resident}
        return found | ({" on the device": self._device_bytes()} if self._device_bytes else {})

    def _beat(self) -> None:
        """Write the file again and again until the job ends."""
        while True:
            self._write(RUNNING)
            if self._ended.wait(HEARTBEAT):
                return

    def _write(self, status: str) -> None:
        """Write the file, without a flush to the disk: it says nothing that must survive a power cut."""
        if self._file is None:
            return
        content: dict[str, Any] = {
            "status": status,
            **asdict(self._state),
            "seconds_left": self._left() if status == RUNNING else None,
            "memory": self._memory(),
            "started": self._started,
            "updated": time.time(),
            "pid": os.getpid(),
            "host": platform.node(),
        }
        temporary = self._file.with_name(f".{FILE}.{os.getpid()}.tmp")
        with self._lock, suppress(OSError):  # a full disk is reported by what must be written
            if status == RUNNING and self._ended.is_set():
                return
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            temporary.replace(self._file)
