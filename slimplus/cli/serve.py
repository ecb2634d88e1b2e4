"""Serve a packed checkpoint with OpenAI's API: through vLLM where it is installed, else through transformers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from slimplus.cli.console import positive_integer, write
from slimplus.hub.contents import read_contents
from slimplus.utils.errors import InputError

SERVERS = {"vllm": "vllm.entrypoints.cli.main", "transformers": "transformers.cli.transformers"}
"""Module of each engine's console script, which serves by its command `serve`."""

SERVING_MODULES = ("fastapi", "openai", "pydantic", "uvicorn")
"""What transformers' server needs beside transformers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus serve`."""
    parser.add_argument("path", help="folder of a packed checkpoint, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine")
    parser.add_argument("--port", type=positive_integer, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument("--engine", choices=("auto", *SERVERS), default="auto", help="default: vLLM if it is installed")
    parser.epilog = (
        "Further options, after the path, go to the engine's own serve: --tensor-parallel-size 2, --dtype float32."
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus serve`: check the checkpoint, and become the engine's server.

    Raises:
        InputError: if there is no packed checkpoint, it is damaged, or the engine is not installed.
    """
    folder = str(read_contents(arguments.path).folder)
    engine = choose_engine(arguments.engine)
    address = ["--host", arguments.host, "--port", str(arguments.port)]
    name = ["--served-model-name", arguments.path] if engine == "vllm" else []  # transformers takes the folder's path
    write(f'{engine} serves {folder} at http://{arguments.host}:{arguments.port}/v1, model "{(name or [folder])[-1]}"')
    sys.stdout.flush()
    command = [sys.executable, "-m", SERVERS[engine], "serve", folder, *address, *name, *arguments.options]
    os.execv(sys.executable, command)  # signals and the exit status are the server's


def choose_engine(wanted: str) -> str:
    """Return the engine that serves, `vllm` or `transformers`; `auto` takes the first that is installed.

    Raises:
        InputError: naming what is to be installed.
    """
    missing = {
        "vllm": [] if _is_installed("vllm") else ["vllm"],
        "transformers": [] if all(map(_is_installed, SERVING_MODULES)) else ["'transformers[serving]'"],
    }
    for engine in SERVERS if wanted == "auto" else [wanted]:
        if not missing[engine]:
            return engine
    if wanted == "auto":
        raise InputError(
            "slimplus serve needs vLLM or transformers' server, and neither is installed: pip install vllm, or pip "
            "install 'transformers[serving]'"
        )
    raise InputError(f"--engine {wanted}: it is not installed: pip install {missing[wanted][0]}")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
