"""The command `train`: its help, the run of a recipe, and the exit status."""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TextIO

import yaml

from slimplus.cli.console import WIDTH, write
from slimplus.distributed.preemption import Preempted, requeue
from slimplus.recipe.parsing import describe_type, load_recipe, recipe_file, recipe_names
from slimplus.recipe.preflight import check_inputs
from slimplus.recipe.schema import Recipe, keys
from slimplus.utils.errors import BAD_INPUT, INTERRUPTED, PREEMPTED, TRY_AGAIN, InputError, TemporaryFailure, is_full

HELP = ("-h", "--help")


def help_text() -> str:
    """Return the help: usage, the recipes, and every key with its meaning, type and default."""
    return "\n".join(
        [
            "usage: python train.py recipe=NAME [key=value ...]",
            "       slimplus train recipe=NAME [key=value ...]    (the same, once installed)",
            "",
            "Quantize a language model as a recipe says. NAME is a recipe below or a YAML file of your own.",
            "Each key=value overrides one key of the recipe; the value is read as YAML.",
            "",
            "recipes:",
            *_recipe_lines(),
            "",
            "keys:",
            *_key_lines(),
        ]
    )


def _recipe_lines() -> Iterator[str]:
    """Yield a line for each recipe, with what it is for."""
    names = recipe_names()
    for name in names:
        lines = recipe_file(name).read_text(encoding="utf-8").splitlines()
        _command, about = lines[:2]  # a recipe's header: the exact command, then a line about it
        yield f"  {name:{max(map(len, names))}}  {about.lstrip('# ')}"


def _key_lines() -> Iterator[str]:
    """Yield the lines on each key: its meaning, type and default."""
    known = keys()
    for key, field in known.items():
        default = "set by the recipe" if field.is_required() else _default(field.default)
        start = f"  {key:{max(map(len, known))}}  "
        indent = " " * len(start)
        yield textwrap.fill(field.description or "", WIDTH, initial_indent=start, subsequent_indent=indent)
        meaning = f"[{describe_type(field)}; default: {default}]"
        yield textwrap.fill(meaning, WIDTH, initial_indent=indent, subsequent_indent=f"{indent} ")


def _default(value: object) -> str:
    """Return a default value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def train(arguments: list[str]) -> int:
    """Run the recipe that a command line names.

    Args:
        arguments: `recipe=NAME key=value ...`, or `--help`.

    Returns:
        The exit status: 0, 2 for bad input, 75 for a failure that passes, 130 after Ctrl-C, 143 after SIGTERM or
        SIGUSR1.
    """
    if any(argument in HELP for argument in arguments):
        write(help_text())
        return 0
    try:
        recipe = load_recipe(arguments)
        check_inputs(recipe)
        return _run(recipe)
    except InputError as error:
        write(str(error), sys.stderr)
        return BAD_INPUT


class _Messages(logging.StreamHandler[TextIO]):
    """Handler that writes to the standard error output of the moment: a live line replaces it, to stay below."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def _pipeline(recipe: Recipe) -> Callable[[Recipe], str | None]:
    """Return the function that runs `recipe`; importing it loads PyTorch."""
    if recipe.dry_run:
        from slimplus.pipeline.plan import dry_run

        return dry_run
    from slimplus.pipeline.run import run

    return run


def _run(recipe: Recipe) -> int:
    """Run a recipe that passed the checks, and return the exit status."""
    command = "the same command" if recipe.resume.start == "auto" else "the same command with resume=auto"
    go_on = f"{command} goes on from what {recipe.run_dir} holds."
    try:
        logging.basicConfig(format="%(message)s", handlers=[_Messages()])
        result = _pipeline(recipe)(recipe)
        if result is not None:  # on the first process of a job
            write(result)
    except KeyboardInterrupt:
        write(f"Interrupted; {go_on}", sys.stderr)
        return INTERRUPTED
    except Preempted as preempted:
        queued = requeue() if preempted.signal == signal.SIGUSR1 else None
        write(f"Ended by {preempted}; {f'{queued}, and ' if queued else ''}{go_on}", sys.stderr)
        return PREEMPTED
    except TemporaryFailure as failure:
        write(f"{failure}; {go_on}", sys.stderr)
        return TRY_AGAIN
    except OSError as error:
        if not is_full(error):
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        write(f"No space is left for {recipe.run_dir}{where}; free some, then {go_on}", sys.stderr)
        return TRY_AGAIN
    return 0
