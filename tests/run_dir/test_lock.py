"""One job at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from slimplus.run_dir.lock import readable_errors
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import run


def test_two_jobs_in_one_folder_are_kept_apart(copy: Path, arguments: Arguments) -> None:
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"run_dir: another job is at work in {copy}; wait for it, or end it"):
            run(arguments(copy))
    run(arguments(copy))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR])
def test_a_file_of_the_run_that_cannot_be_used_is_a_sentence(tmp_path: Path, number: int) -> None:
    said = (
        rf"run_dir: {tmp_path}/blocks/a cannot be used \(.*\); change its permissions or owner, or give another run_dir"
    )
    with pytest.raises(InputError, match=said), readable_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "blocks/a"))


@pytest.mark.parametrize(("number", "file"), [(errno.ENOSPC, "a"), (errno.EACCES, "/elsewhere"), (errno.EACCES, None)])
def test_other_errors_of_the_system_are_left_alone(tmp_path: Path, number: int, file: str | None) -> None:
    path = str(tmp_path / file) if file else None
    with pytest.raises(OSError, match=os.strerror(number)) as caught, readable_errors(tmp_path):
        raise OSError(number, os.strerror(number), path)
    assert not isinstance(caught.value, InputError)
