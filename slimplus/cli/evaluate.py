"""Measure a checkpoint on texts: perplexity, and divergence from the model that it was made from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slimplus.cli.console import add_placement, positive_integer, write
from slimplus.utils.errors import InputError
from slimplus.utils.files import write_atomic
from slimplus.utils.requirements import QUANTIZATION, check_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus evaluate`."""
    parser.add_argument("path", help="a checkpoint that transformers loads: folder, hub id, package:NAME or FILE.gguf")
    parser.add_argument("--against", metavar="MODEL", help="the model that it was made from, in the same ways")
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a name or a file, as for data.evaluation.path; give it again for further texts; default: offline",
    )
    parser.add_argument("--windows", type=positive_integer, default=16, metavar="N", help="of each text; default: 16")
    parser.add_argument(
        "--sequence-length", type=positive_integer, default=2048, metavar="N", help="tokens in a window; default: 2048"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON as well")
    add_placement(parser, dtype="auto")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus evaluate`: measure, and write a table.

    Raises:
        InputError: if an argument is wrong, or a model, a text or the device does not exist.
    """
    check_installed("slimplus evaluate", QUANTIZATION)
    if arguments.sequence_length < 2:
        raise InputError("--sequence-length: give at least 2, since the first token of a window is not predicted")
    if arguments.json and arguments.json.is_dir():
        raise InputError(f"--json: {arguments.json} is a folder; give a file")
    from slimplus.data.text import check_source

    texts = arguments.text or ["offline"]
    try:
        for text in texts:
            check_source(text, "evaluation")

        from slimplus.evaluation.checkpoints import EvaluationConfig, evaluate, table  # this loads PyTorch

        config = EvaluationConfig(
            texts, arguments.windows, arguments.sequence_length, arguments.device, arguments.dtype
        )
        rows = evaluate(arguments.path, arguments.against, config)
    except InputError as error:  # whose message names keys of a recipe
        said = str(error)
        for key, argument in KEYS.items():
            said = said.replace(key, argument)
        raise InputError(said) from None
    if arguments.json:
        write_atomic(arguments.json, json.dumps(rows, indent=2) + "\n")
    write(table(rows))


KEYS = {
    "data.evaluation.path": "--text",
    "data.evaluation.sequence_length": "--sequence-length",
    "model.path": "the model",
}
"""Key of a recipe in a message → argument that stands for it here."""
