"""The figures of a run, kept in metrics.json after every stage and block."""

from __future__ import annotations

import logging
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from slimplus.run_dir.directory import RunDirectory
from slimplus.utils.errors import InputError, first_line
from slimplus.utils.machine import peak_resident_bytes
from slimplus.utils.progress import Progress

logger = logging.getLogger(__name__)

FILE = "metrics.json"


class Metrics(UserDict[str, Any]):
    """The content of metrics.json, which a job fills stage by stage.

    Args:
        values: the figures so far.
        run: the run directory that keeps them.
        device: the device whose memory is watched.
        writes: whether this process writes the file; one process of a job does.
        progress: what is told which stage is at work.
    """

    def __init__(
        self, values: Mapping[str, Any], run: RunDirectory, device: torch.device, writes: bool, progress: Progress
    ) -> None:
        super().__init__(values)
        self._run, self._device, self._writes, self._progress = run, device, writes, progress
        self._stage, self._since = "", 0.0

    def save(self) -> None:
        """Write metrics.json."""
        if self._writes:
            self._run.write(FILE, self.data)

    def note(self, event: str) -> None:
        """Warn of something that a reader of the results should know, and keep it once among the events."""
        logger.warning("%s", event)
        if event not in self["events"]:
            self["events"].append(event)

    def forget_stages(self, *names: str) -> None:
        """Drop the seconds of stages whose earlier results do not count."""
        for name in names:
            self["seconds"].pop(name, None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and keep the figures when it ends or is interrupted.

        Raises:
            InputError: if the device's memory does not suffice.
        """
        self._stage, self._since = name, time.perf_counter()
        self._progress.begin(name)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{name}: out of device memory ({first_line(error)}); give a larger device, a lower "
                "data.sequence_length or data.evaluation.sequence_length, or trainer.accelerator=cpu; what is finished "
                "is kept"
            ) from error
        finally:
            self.checkpoint()
            self._progress.end()

    def checkpoint(self) -> None:
        """Save the seconds and the memory of the stage up to here: a killed job cannot save them at its end."""
        now = time.perf_counter()
        self["seconds"][self._stage] = self["seconds"].get(self._stage, 0) + now - self._since
        self._since = now
        self._note_memory("memory_bytes", peak_resident_bytes())
        if self._device.type == "cuda":
            self._note_memory("device_memory_bytes", torch.cuda.max_memory_allocated(self._device))
        self.save()

    def _note_memory(self, name: str, occupied: int) -> None:
        """Note the most bytes that this process has occupied so far, for the run and for the stage."""
        self[f"peak_{name}"] = max(self.get(f"peak_{name}", 0), occupied)
        stages = self.setdefault(f"stage_{name}", {})
        stages[self._stage] = max(stages.get(self._stage, 0), occupied)


def device_bytes(device: torch.device) -> Callable[[], int] | None:
    """Return a function that tells the bytes in use on a device, or None if it has no memory of its own."""
    return partial(torch.cuda.memory_allocated, device) if device.type == "cuda" else None
