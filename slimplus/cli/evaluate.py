"""Measure a checkpoint on texts and tasks, alone or against the model that it was made from."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from slimplus.cli.console import add_placement, non_negative_integer, positive_integer, write
from slimplus.evaluation.tables import align, task_cells, text_cells
from slimplus.utils.errors import InputError, keys_renamed
from slimplus.utils.files import write_atomic
from slimplus.utils.requirements import QUANTIZATION, TASKS, check_installed


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
    parser.add_argument("--column", metavar="NAME", help="column that holds the text, of all texts; default: text")
    parser.add_argument("--windows", type=positive_integer, default=16, metavar="N", help="of each text; default: 16")
    parser.add_argument(
        "--sequence-length", type=positive_integer, default=2048, metavar="N", help="tokens in a window; default: 2048"
    )
    parser.add_argument(
        "--stride",
        type=positive_integer,
        metavar="N",
        help="tokens from a window to the next; of all but the first only the last N count; default: side by side",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "never", "window"),
        default="auto",
        help="where the beginning-of-text token stands: at the text's beginning if the tokenizer puts it there, "
        "nowhere, or in each window; default: auto",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-eval: paper, mmlu, any other name, .yaml task files, or folders of them; texts only if "
        "--text names them",
    )
    parser.add_argument(
        "--num-fewshot", type=non_negative_integer, metavar="N", help="examples in a prompt; default: the task's own"
    )
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="examples of each task; default: all")
    parser.add_argument(
        "--batch-size", type=positive_integer, default=8, metavar="N", help="examples that run at once; default: 8"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON as well")
    add_placement(parser, dtype="auto")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus evaluate`: measure, and write tables.

    Raises:
        InputError: if an argument is wrong, or a model, a text, a task or the device does not exist.
    """
    check_installed("slimplus evaluate", QUANTIZATION)
    if arguments.sequence_length < 2:
        raise InputError("--sequence-length: give at least 2, since the first token of a window is not predicted")
    longest = arguments.sequence_length - (arguments.bos == "window")
    if arguments.stride is not None and arguments.stride > longest:
        raise InputError(
            f"--stride: {arguments.stride} leaves gaps between windows of {longest} tokens of the text; give at most "
            f"{longest}"
        )
    if arguments.json and not (arguments.json.parent.is_dir() and os.access(arguments.json.parent, os.W_OK)):
        raise InputError(f"--json: {arguments.json.parent} is no folder that can be written to; give another file")
    if arguments.json and arguments.json.is_dir():
        raise InputError(f"--json: {arguments.json} is a folder; give a file")
    with keys_renamed(KEYS):
        found = _measure(arguments)
    tables = [text_cells(found["texts"])] if found["texts"] else []
    tables += [task_cells(found["tasks"]["scores"])] if "tasks" in found else []
    write("\n\n".join(map(align, tables)))
    if arguments.json:
        write_atomic(arguments.json, json.dumps(found, indent=2) + "\n")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check texts and tasks before PyTorch is loaded, and return the figures."""
    from slimplus.data.text import check_source

    texts = arguments.text or ([] if arguments.tasks else ["offline"])
    for text in texts:
        check_source(text, "evaluation")
    if arguments.tasks:
        check_installed("--tasks", TASKS)

    from slimplus.evaluation.checkpoints import EvaluationConfig, evaluate  # this loads PyTorch
    from slimplus.evaluation.tasks import TaskConfig
    from slimplus.evaluation.texts import TextConfig

    sizes = (arguments.windows, arguments.sequence_length)
    reading = {"column": arguments.column, "stride": arguments.stride, "bos": arguments.bos}
    configs = [TextConfig(text, *sizes, **reading) for text in texts]
    asked = (arguments.tasks, arguments.num_fewshot, arguments.limit, arguments.batch_size)
    tasks = TaskConfig(*asked) if arguments.tasks else None
    return evaluate(
        arguments.path, arguments.against, EvaluationConfig(configs, tasks, arguments.device, arguments.dtype)
    )


KEYS = {
    "data.evaluation.path": "--text",
    "data.evaluation.column": "--column",
    "data.evaluation.sequence_length": "--sequence-length",
    "data.bos": "--bos",
    "evaluation.tasks": "--tasks",
    "model.path": "the model",
}
"""Key of a recipe in a message → argument that stands for it here."""
