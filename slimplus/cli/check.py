"""Check a model before a run: what it is, what gets packed, what is wrong with its files, tensors and tokenizer."""

from __future__ import annotations

import argparse

from slimplus.cli.console import write
from slimplus.models.location import resolve_model_folder
from slimplus.models.source_files import location_problem
from slimplus.utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus check`."""
    parser.add_argument("model", help="folder, hub id or package:NAME of a full-precision model")
    parser.add_argument("--gguf-file", metavar="NAME", help="the file in MODEL that holds the weights, if it is a GGUF")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id; default: main")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that ships with the model")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus check`: write what is known of the model, then notes on what is unusual.

    Raises:
        InputError: a sentence a line for everything that is wrong with the model.
    """
    if problem := location_problem(arguments.model, arguments.gguf_file, arguments.revision):
        raise InputError(_as_options(problem))

    from slimplus.models.loading import ModelSource, build_on_meta  # with PyTorch
    from slimplus.models.source_check import check_source
    from slimplus.pipeline.model_checks import check_packed_share
    from slimplus.pipeline.self_check import describe, self_check

    source = ModelSource(
        resolve_model_folder(arguments.model),
        arguments.gguf_file,
        trust_remote_code=arguments.trust_remote_code,
        revision=arguments.revision,
    )
    source = source.pinned()
    report = check_source(source)
    try:
        config = source.config()
        model = build_on_meta(config)
        report.facts |= describe(model).rows()
        self_check(config)
        check_packed_share(model, allow_unpacked=False)
    except InputError as error:
        if (problem := str(error)) not in report.problems:
            report.problems.append(problem)
    width = max(map(len, report.facts), default=0)
    for name, value in report.facts.items():
        write(f"{name:<{width}}  {value}")
    for note in report.notes:
        write(f"note: {note}")
    if report.problems:
        raise InputError("\n".join(map(_as_options, report.problems)))
    write("no problems found")


def _as_options(problem: str) -> str:
    """Return a sentence about keys of a recipe as one about the options of this command."""
    renamed = problem.replace("model.gguf_file: ", "--gguf-file: ").replace("model.gguf_file=", "--gguf-file ")
    return renamed.removeprefix("model.path: ")
