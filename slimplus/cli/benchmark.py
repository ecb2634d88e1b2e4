"""Measure a packed checkpoint, and the dense model beside it if given: tokens/s, memory, load time."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimplus.cli.console import add_placement, positive_integer, write
from slimplus.evaluation.speed import benchmark, table
from slimplus.evaluation.workload import Candidate, Workload
from slimplus.hub.contents import read_contents
from slimplus.models.location import resolve_model_folder
from slimplus.utils.errors import InputError
from slimplus.utils.files import write_atomic
from slimplus.utils.json_text import to_json
from slimplus.utils.requirements import RECIPE, check_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus benchmark`."""
    parser.add_argument("path", help="folder of a packed checkpoint, or a hub id")
    parser.add_argument("--dense", metavar="MODEL", help="folder, hub id or package:NAME of the model it was made from")
    parser.add_argument("--gguf-file", metavar="NAME", help="the file in MODEL that holds the weights, if it is a GGUF")
    parser.add_argument("--prompt-tokens", type=positive_integer, default=512, metavar="N", help="default: 512")
    parser.add_argument("--new-tokens", type=positive_integer, default=64, metavar="N", help="default: 64")
    parser.add_argument("--rounds", type=positive_integer, default=5, metavar="N", help="the median counts; default: 5")
    decoding = parser.add_mutually_exclusive_group()
    decoding.add_argument(
        "--static-cache",
        action="store_true",
        help="decode with a static cache: on a GPU transformers then compiles the step into a CUDA graph",
    )
    decoding.add_argument(
        "--graph", action="store_true", help="decode as slimplus generate does on a GPU, a CUDA graph for each token"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round, the machine and versions as well")
    add_placement(parser, dtype="bfloat16")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus benchmark`: measure the models in turn, and write a table.

    Raises:
        InputError: if an argument is wrong, or a model or the device does not exist.
    """
    if arguments.new_tokens < 2:
        raise InputError("--new-tokens: give at least 2, since the first one counts as prefill")
    if arguments.gguf_file and not arguments.dense:
        raise InputError("--gguf-file: names a file of --dense MODEL; give --dense as well")
    if arguments.json and arguments.json.is_dir():
        raise InputError(f"--json: {arguments.json} is a folder; give a file")
    contents = read_contents(arguments.path)
    _check_length(contents.context_length, arguments.prompt_tokens + arguments.new_tokens)

    candidates = {"packed": Candidate(str(contents.folder), packed=True)}
    if arguments.dense:
        candidates["dense"] = _dense(arguments.dense, arguments.gguf_file)
    workload = Workload(
        arguments.prompt_tokens,
        arguments.new_tokens,
        arguments.rounds,
        arguments.device,
        arguments.dtype,
        arguments.static_cache,
        arguments.graph,
    )
    result = benchmark(candidates, workload)
    if arguments.json:
        write_atomic(arguments.json, to_json(result, indent=2) + "\n")
    write(table(result))


def _check_length(longest: int | None, tokens: int) -> None:
    """Check that prompt and new tokens fit the model's context."""
    if longest is not None and tokens > longest:
        raise InputError(
            f"--prompt-tokens and --new-tokens: {tokens} tokens are more than the model takes; give at most {longest} "
            "together"
        )


def _dense(path: str, gguf_file: str | None) -> Candidate:
    """Return the dense model to measure, if it exists."""
    check_installed("--dense", RECIPE)
    from slimplus.recipe.inputs import ModelSection
    from slimplus.recipe.preflight import check_model

    try:
        check_model(ModelSection(path=path, gguf_file=gguf_file))
    except InputError as error:  # whose message names keys of a recipe
        raise InputError(
            str(error).replace("model.path", "--dense").replace("model.gguf_file", "--gguf-file")
        ) from None
    return Candidate(resolve_model_folder(path), packed=False, gguf_file=gguf_file)
