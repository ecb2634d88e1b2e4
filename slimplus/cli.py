"""The command line: `slimplus train recipe=NAME key=value ...`, which `python train.py` runs as well.

Nothing heavy is imported until the recipe and its inputs have passed every check.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

import yaml

from slimplus.config import keys
from slimplus.errors import InputError
from slimplus.preflight import check_inputs
from slimplus.reading import describe_type, load_recipe, recipe_file, recipe_names

WIDTH = 110  # columns of the help text
BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses: argparse's, and a shell's for Ctrl-C
HELP = ("-h", "--help")


def write(text: str, stream: TextIO | None = None) -> None:
    """Writes a line: all that the command line itself says goes through here."""
    (stream or sys.stdout).write(f"{text}\n")


def help_text() -> str:
    """Usage, the recipes, and every key with its meaning, type and default, taken from the models."""
    return "\n".join(
        [
            "usage: python train.py recipe=NAME [key=value ...]",
            "       slimplus train recipe=NAME [key=value ...]    (the same, once installed)",
            "",
            "Quantizes a language model as a recipe says. NAME is a recipe below or a YAML file of your own.",
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
    names = recipe_names()
    for name in names:
        lines = recipe_file(name).read_text(encoding="utf-8").splitlines()
        _command, about = lines[:2]  # a recipe's header: the exact command, then a line about it
        yield f"  {name:{max(map(len, names))}}  {about.lstrip('# ')}"


def _key_lines() -> Iterator[str]:
    known = keys()
    for key, field in known.items():
        default = "set by the recipe" if field.is_required() else yaml.safe_dump(field.default).splitlines()[0]
        start = f"  {key:{max(map(len, known))}}  "
        indent = " " * len(start)
        yield textwrap.fill(field.description or "", WIDTH, initial_indent=start, subsequent_indent=indent)
        meaning = f"[{describe_type(field)}; default: {default}]"
        yield textwrap.fill(meaning, WIDTH, initial_indent=indent, subsequent_indent=f"{indent} ")


def train(arguments: list[str]) -> int:
    """Runs a recipe; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    if any(argument in HELP for argument in arguments):
        write(help_text())
        return 0
    try:
        recipe = load_recipe(arguments)
        check_inputs(recipe)
    except InputError as error:
        write(str(error), sys.stderr)
        return BAD_INPUT
    try:
        from slimplus import pipeline  # only now: it loads PyTorch

        logging.basicConfig(format="%(message)s")
        result = pipeline.dry_run(recipe) if recipe.dry_run else pipeline.run(recipe)
        if result is not None:  # only the first process of a job has something to say
            write(result)
    except InputError as error:
        write(str(error), sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        command = "the same command" if recipe.resume.start == "auto" else "the same command with resume=auto"
        write(f"Interrupted; {command} goes on from what {recipe.run_dir} holds.", sys.stderr)
        return INTERRUPTED
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The console script `slimplus`."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "train":
        return train(rest)
    if command in HELP:
        write(help_text())
        return 0
    write(f"{command!r} is not a command; use `slimplus train recipe=NAME`, or `slimplus --help`", sys.stderr)
    return BAD_INPUT
