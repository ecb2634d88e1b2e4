"""Write a run's report, or one that compares several runs: an HTML file that loads nothing from anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimplus.cli.console import write
from slimplus.utils.errors import InputError
from slimplus.utils.requirements import REPORT, check_installed

COMPARISON = "comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several are compared")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"default: report.html in the run directory; {COMPARISON} in this folder for several runs",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus report`: write the page, and its path to the standard output.

    Raises:
        InputError: if a folder is no run directory, a file of it is damaged, or the page cannot be written.
    """
    check_installed("slimplus report", REPORT)
    from slimplus.report.page import write_report
    from slimplus.report.run_files import FILE

    default = Path(COMPARISON) if len(arguments.runs) > 1 else Path(arguments.runs[0]).expanduser() / FILE
    file = arguments.output or default
    if file.is_dir():
        raise InputError(f"--output: {file} is a folder; give a file")
    write_report(arguments.runs, file)
    write(str(file))
