"""Write a packed checkpoint in the format of another engine, layer by layer, and tell what is exact."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimplus.cli.console import write
from slimplus.hub.contents import CheckpointContents, read_contents
from slimplus.utils.errors import InputError, first_line, is_full
from slimplus.utils.files import TEMPORARY_SUFFIX, remove, sync_folder
from slimplus.utils.requirements import check_installed

FORMATS = ("dense", "gguf", "compressed-tensors", "gptq")
GGUF_TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus export`."""
    parser.add_argument("path", help="run directory, folder of a packed checkpoint, or a hub id")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="dense: safetensors that transformers loads without slimplus; gguf: one file for llama.cpp and Ollama; "
        "compressed-tensors and gptq: packed safetensors, of runs with quantization.zero_points=integer and one width "
        "a layer",
    )
    parser.add_argument("out", help="folder, or file (gguf), to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of what is not packed; default: bfloat16 for dense, else float16",
    )
    parser.add_argument(
        "--gguf-type",
        choices=GGUF_TYPES,
        help="type of embedding and head in GGUF where they are not packed; default: f16. The others round them to "
        "so many bits",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus export`: write the checkpoint, and a table of what is exact.

    Raises:
        InputError: if there is no packed checkpoint, the target exists, the format cannot hold the model, or an
            option is for another format.
    """
    if arguments.to == "gguf" and arguments.dtype:
        raise InputError("--dtype: GGUF has types of its own; give --gguf-type")
    if arguments.to != "gguf" and arguments.gguf_type:
        raise InputError("--gguf-type is for --to gguf; give --dtype")
    packed = Path(arguments.path, "packed")
    contents = read_contents(str(packed) if (packed / "config.json").is_file() else arguments.path)
    out = Path(arguments.out).expanduser()
    if out.exists():
        raise InputError(f"{out} exists; give a name that is free, or remove it")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder; make it, or give another name")
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    remove(temporary)
    try:
        rows = _export(contents, temporary, arguments)
        for path in (*temporary.rglob("*"), temporary):
            sync_folder(path)
        temporary.rename(out)
    except OSError as error:
        remedy = "free some space" if is_full(error) else "check its permissions"
        raise InputError(f"{out} cannot be written ({first_line(error)}); {remedy}") from error
    finally:
        remove(temporary)
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        write("  ".join(f"{cell:<{size}}" for cell, size in zip(row, sizes, strict=True)).rstrip())


def _export(
    contents: CheckpointContents, target: Path, arguments: argparse.Namespace
) -> list[tuple[str, str, str, str]]:
    """Write the checkpoint to a temporary file or folder, and return the table of what is exact."""
    if arguments.to == "gguf":
        check_installed("slimplus export --to gguf", {"gguf": "gguf"})
        from slimplus.hub.gguf import export_gguf

        return export_gguf(contents, target, arguments.gguf_type or "f16").rows()
    import torch

    from slimplus.hub.dense import export_dense
    from slimplus.hub.integer_formats import COMPRESSED_TENSORS, GPTQ, export_integers

    target.mkdir()
    if arguments.to == "dense":
        return export_dense(contents, target, getattr(torch, arguments.dtype or "bfloat16")).rows()
    layout = GPTQ if arguments.to == "gptq" else COMPRESSED_TENSORS
    return export_integers(contents, target, getattr(torch, arguments.dtype or "float16"), layout).rows()
