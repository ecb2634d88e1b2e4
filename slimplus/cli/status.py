"""Say where a run stands: whether it is alive, its stage, block, step and loss, the time left, the memory in use."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimplus.cli.console import write
from slimplus.run_dir.lock import LOCK
from slimplus.utils.errors import InputError
from slimplus.utils.progress import FILE, FINISHED, HEARTBEAT, RUNNING, State
from slimplus.utils.units import format_bytes, format_seconds

SILENCE = 12 * HEARTBEAT  # seconds without a sign of life after which a job on another machine is taken for lost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus status`."""
    parser.add_argument("run", metavar="RUN", help="run directory")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus status`: write what is known of the run, a line for each fact.

    Raises:
        InputError: if the folder is no run directory, or no job has begun its work there.
    """
    file = Path(arguments.run).expanduser() / FILE
    try:
        progress = json.loads(file.read_text(encoding="utf-8"))
        rows = describe(progress, time.time())
    except OSError as error:
        if (file.parent / LOCK).is_file():
            raise InputError(f"{file.parent}: the run there has not got beyond its start; ask again soon") from error
        raise InputError(
            f"{file} cannot be read ({error.strerror}); give the run_dir of a run that has begun"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); a running job writes it again within seconds") from error
    width = max(map(len, rows))
    for name, value in rows.items():
        write(f"{name:<{width}}  {value}")


def describe(progress: Mapping[str, Any], now: float) -> dict[str, str]:
    """Return the rows to show for the content of progress.json.

    Args:
        progress: the content.
        now: the present time, in seconds since 1970.
    """
    state = State(**{name: progress[name] for name in State.__dataclass_fields__})
    rows = {"status": status(progress, now)}
    if progress["status"] != FINISHED:
        rows |= _place(state)
    if progress["seconds_left"] is not None:
        rows["time left"] = f"about {format_seconds(progress['seconds_left'])} to the end of the run"
    if progress["memory"]:
        rows["memory"] = ", ".join(f"{format_bytes(size)}{place}" for place, size in progress["memory"].items())
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(progress["started"]))
    rows["started"] = f"{start}, {format_seconds(progress['updated'] - progress['started'])} of work"
    return rows


def _place(state: State) -> dict[str, str]:
    """Return the rows on a state."""
    rows = {"stage": state.stage.replace("_", " ")}
    if state.parts:
        rows[state.unit] = f"{min(state.part, state.parts)} of {state.parts}"
    if state.steps:
        rows["step"] = f"{state.step} of {state.steps}"
    if state.loss is not None:
        rows["loss"] = f"{state.loss:.4g}"
    return rows


def status(progress: Mapping[str, Any], now: float) -> str:
    """Return whether a job runs, how it ended, or that it is lost, for the content of progress.json."""
    ago = format_seconds(max(now - progress["updated"], 0))
    where = f"process {progress['pid']} on {progress['host']}"
    if progress["status"] != RUNNING:
        return f"{progress['status']}, {ago} ago"
    is_here = progress["host"] == platform.node()
    if (is_here and not _exists(progress["pid"])) or (not is_here and now - progress["updated"] > SILENCE):
        return f"lost: {where} has not been heard of for {ago}; the same command goes on"
    silent = now - progress["updated"] > SILENCE
    return f"running, {where}" + (f", without a sign of life for {ago}" if silent else "")


def _exists(pid: int) -> bool:
    """Return whether a process of this machine exists, and has not ended without its parent's notice."""
    with suppress(OSError):  # where there is no /proc
        if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
