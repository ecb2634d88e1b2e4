"""One job at a time in a run directory."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import run


def test_two_jobs_in_one_folder_are_kept_apart(copy: Path, arguments: Arguments) -> None:
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"run_dir: another job is at work in {copy}; wait for it, or end it"):
            run(arguments(copy))
    run(arguments(copy))
