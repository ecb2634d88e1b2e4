"""Continue a text with a packed checkpoint, and write it word by word."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slimplus.cli.console import add_placement, non_negative_number, positive_integer
from slimplus.hub.contents import read_contents
from slimplus.utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus generate`."""
    parser.add_argument("path", help="folder of a packed checkpoint, or a hub id")
    parser.add_argument("prompt", help="text to continue; with --chat, the message to answer")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=positive_integer, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature",
        type=non_negative_number,
        default=0.0,
        metavar="T",
        help="above 0, tokens are drawn; default: 0, the likeliest token each time",
    )
    parser.add_argument(
        "--top-p", type=non_negative_number, default=1.0, metavar="P", help="draw among the likeliest; default: 1, all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    add_placement(parser, dtype="auto")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus generate`: write the continuation, without the prompt, word by word.

    Raises:
        InputError: if an argument is wrong, or there is no packed checkpoint, no such device, or no chat template.
    """
    if not arguments.prompt:
        raise InputError("the prompt is empty; give some text to continue")
    if any("\ud800" <= character <= "\udfff" for character in arguments.prompt):  # bytes that Python could not decode
        raise InputError("the prompt is not valid UTF-8; convert it, with iconv for example")
    if not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p: expected a number above 0 and at most 1, got {arguments.top_p:g}")
    contents = read_contents(arguments.path)
    if arguments.chat and not has_chat_template(contents.folder):
        raise InputError(f"--chat: the tokenizer in {contents.folder} has no chat template; leave --chat out")

    from slimplus.evaluation.generation import Sampling, load_for_generation, stream  # this loads PyTorch

    loaded = load_for_generation(contents.folder, arguments.device, arguments.dtype)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    stream(loaded, arguments.prompt, sampling, chat=arguments.chat)


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer saved in `folder` has a chat template, in a file of its own or in its config.

    Raises:
        InputError: if the tokenizer's config is damaged.
    """
    if any(folder.glob("chat_template.*")) or (folder / "additional_chat_templates").is_dir():
        return True
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); export or download the checkpoint again") from error
    return isinstance(config, dict) and bool(config.get("chat_template"))
