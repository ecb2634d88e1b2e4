"""The console script `slimplus`: its commands and their exit status.

Nothing heavy is imported until the recipe, or the arguments, and their inputs have passed every check.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper

from slimplus.cli import benchmark, check, evaluate, export, generate, inspect, push, report, serve, status
from slimplus.cli.console import Parser, write
from slimplus.utils.errors import BAD_INPUT, INTERRUPTED, InputError
from slimplus.utils.requirements import QUANTIZATION, check_installed

COMMANDS = {
    "check": check,
    "generate": generate,
    "serve": serve,
    "inspect": inspect,
    "evaluate": evaluate,
    "report": report,
    "status": status,
    "benchmark": benchmark,
    "export": export,
    "push": push,
}


def parser() -> Parser:
    """Return the parser of `slimplus COMMAND ...`; what follows `train` is no option, and `main` passes it on."""
    top = Parser("slimplus", description="Mixed-precision quantization of language models, and use of the result.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help="Quantize a model as a recipe says: recipe=NAME [key=value ...].", add_help=False)
    for name, module in COMMANDS.items():
        summary, _, _ = (module.__doc__ or "").partition("\n")
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status, see `train`.

    Args:
        arguments: the command and its arguments; None takes those of the process.

    Raises:
        SystemExit: if the arguments ask for help or are wrong (raised by argparse).
    """
    given = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal in ASCII gets an escape for what it cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if given[:1] == ["train"]:
            check_installed("slimplus train", QUANTIZATION)
            from slimplus.cli.train import train  # with libraries that using a checkpoint does not need

            return train(given[1:])
        top = parser()
        parsed, options = top.parse_known_args(given or ["--help"])
        parsed.options = options
        if options and parsed.command != "serve":  # which hands them on to the engine
            top.error(f"unrecognized arguments: {' '.join(options)}")
        COMMANDS[parsed.command].run(parsed)
    except InputError as error:
        write(str(error), sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
