"""The command line: `slimplus train recipe=NAME key=value ...`, which `python train.py` runs as well, and the commands
for using what it makes.

Nothing heavy is imported until the recipe, or the arguments, and their inputs have passed every check.
"""

from __future__ import annotations

import sys

from slimplus.cli import benchmark, generate, inspect
from slimplus.cli.console import Parser, write
from slimplus.cli.train import train
from slimplus.utils.errors import BAD_INPUT, INTERRUPTED, InputError

COMMANDS = {"generate": generate, "inspect": inspect, "benchmark": benchmark}


def parser() -> Parser:
    """Of `slimplus COMMAND ...`. What follows `train` is no option, so `main` hands it on by itself."""
    top = Parser("slimplus", description="Mixed-precision quantization of language models, and use of the result.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "train", help="Quantizes a model as a recipe says: recipe=NAME [key=value ...].", add_help=False
    )
    for name, module in COMMANDS.items():
        summary, _, _ = (module.__doc__ or "").partition("\n")
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return top


def main(arguments: list[str] | None = None) -> int:
    """The console script `slimplus`; returns the exit status as `train` does.

    Raises:
        SystemExit: from argparse, for help and for arguments that are wrong.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["train"]:
        return train(given[1:])
    parsed = parser().parse_args(given or ["--help"])
    try:
        COMMANDS[parsed.command].run(parsed)
    except InputError as error:
        write(str(error), sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
