"""The lock that keeps a second job out of a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimplus.utils.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)


@contextmanager
def readable_errors(root: str | Path) -> Iterator[None]:
    """Turn errors of the system about a file below a run directory, but for a full disk, into InputError.

    Args:
        root: the run directory.

    Raises:
        InputError: if a file or a folder of the run cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        folder, file = Path(root).expanduser().absolute(), error.filename
        if (
            error.errno not in UNUSABLE
            or not isinstance(file, str)
            or folder not in (Path(file).absolute(), *Path(file).absolute().parents)
        ):
            raise
        raise InputError(
            f"run_dir: {file} cannot be used ({error.strerror}); change its permissions or owner, or give another "
            "run_dir"
        ) from error


@contextmanager
def locked(root: str | Path, first: bool) -> Iterator[None]:
    """Create a run directory, and keep other jobs out of it within this context.

    Args:
        root: the run directory.
        first: whether this process is the first of its job; the others do nothing.

    Raises:
        InputError: if another job is at work in the folder.
    """
    if not first:
        yield
        return
    folder = Path(root).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"run_dir: another job is at work in {folder}; wait for it, or end it") from error
        except OSError:
            logger.warning("%s is on a file system without locks: see to it that no other job works there", folder)
        yield
