"""What all commands share: writing, one sentence for wrong arguments, types of arguments, `--device` and `--dtype`."""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn, TextIO

from slimplus.utils.errors import BAD_INPUT

WIDTH = 110  # columns of the help text


def write(text: str, stream: TextIO | None = None) -> None:
    """Write a line to the standard output, or to another stream."""
    (stream or sys.stdout).write(f"{text}\n")


class Parser(argparse.ArgumentParser):
    """Parser that reports wrong arguments in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Write what is wrong, and exit with the status for bad input."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; `{self.prog} --help` shows the usage\n")


def positive_integer(text: str) -> int:
    """Return the integer of at least 1 that an argument holds.

    Raises:
        argparse.ArgumentTypeError: if it holds anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def non_negative_integer(text: str) -> int:
    """Return the integer of at least 0 that an argument holds.

    Raises:
        argparse.ArgumentTypeError: if it holds anything else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def non_negative_number(text: str) -> float:
    """Return the finite number of at least 0 that an argument holds.

    Raises:
        argparse.ArgumentTypeError: if it holds anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def add_placement(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add `--device` and `--dtype`, where and in which dtype the model computes; `dtype` is the default."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    choices = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default=dtype, choices=choices, help="default: %(default)s; auto is the stored one")
