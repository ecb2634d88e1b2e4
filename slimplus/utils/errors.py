"""Errors that the user can act on, the statuses that commands exit with, and the first line of any error."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Exit statuses: that of argparse, EX_TEMPFAIL of sysexits.h, and those of a shell for SIGINT and SIGTERM.
BAD_INPUT, TRY_AGAIN, INTERRUPTED, PREEMPTED = 2, 75, 130, 143

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Bad input: one sentence a line, each naming the key, file or tensor and the remedy."""


class TemporaryFailure(RuntimeError):
    """A failure that is no fault of the input: one sentence; the same command, run again, resumes the work."""


def is_full(error: BaseException) -> bool:
    """Return whether the error says that a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in FULL


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def named_first_line(error: BaseException) -> str:
    """Return the name of an error's type and the first line of its message, for messages that say little alone."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0].rstrip(" .:")


@contextmanager
def keys_renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Put other names in the place of a recipe's keys in the sentence of an `InputError`.

    Args:
        names: key in the sentence → what stands for it here, one after the other.
    """
    try:
        yield
    except InputError as error:
        said = str(error)
        for key, name in names.items():
            said = said.replace(key, name)
        raise type(error)(said) from error
