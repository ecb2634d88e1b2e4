"""What the user can put right, and what passes; how a command ends."""

import errno

# Exit statuses: argparse's, sysexits.h's EX_TEMPFAIL, and a shell's for Ctrl-C and SIGTERM.
BAD_INPUT, TRY_AGAIN, INTERRUPTED, PREEMPTED = 2, 75, 130, 143

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Bad input: one sentence a line, each naming the key, file or tensor and the remedy."""


class TemporaryFailure(RuntimeError):
    """What is no fault of the input: a sentence that says what happened; the same command goes on afterwards."""


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in FULL


def first_line(error: BaseException) -> str:
    """What it says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def named_first_line(error: BaseException) -> str:
    """The same after its type, which says more where a message is short."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0].rstrip(" .:")
