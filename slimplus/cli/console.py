"""What every command line of the package shares: writing, and one sentence for bad input."""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn, TextIO

from slimplus.utils.errors import BAD_INPUT

WIDTH = 110  # columns of the help text


def write(text: str, stream: TextIO | None = None) -> None:
    """Writes a line: all that the command line itself says goes through here."""
    (stream or sys.stdout).write(f"{text}\n")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; `{self.prog} --help` shows the usage\n")


def positive_integer(text: str) -> int:
    """Type of an argument.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def non_negative_number(text: str) -> float:
    """Type of an argument.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def add_placement(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Where the model goes, and in which dtype, by default `dtype`, it computes."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    choices = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default=dtype, choices=choices, help="default: %(default)s; auto is the stored one")
