"""Upload a finished run's checkpoint to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimplus.cli.console import write
from slimplus.utils.errors import InputError
from slimplus.utils.units import format_bytes

HEAD = 40  # lines of the card that a dry run shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus push`."""
    parser.add_argument("run", metavar="RUN", help="run directory, or folder of a packed checkpoint")
    parser.add_argument("repository", metavar="REPO", help="hub id org/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository is created, make it private")
    parser.add_argument("--revision", metavar="BRANCH", help="created if it does not exist; default: the main branch")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the files and show the head of the model card; needs no network"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus push`: write the address of the commit, or what would be uploaded.

    Raises:
        InputError: if there is no packed checkpoint or it is damaged, the hub id is none, or the hub does not take it.
    """
    from slimplus.hub.contents import read_contents
    from slimplus.hub.push import Upload, push

    folder = Path(arguments.run).expanduser()
    is_run = (folder / "recipe.yaml").is_file()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the run_dir of a finished run")
    if is_run and not (folder / "summary.txt").is_file():
        raise InputError(f"{folder} holds a run that has not come to its end; start it again, which goes on")
    packed = folder / "packed" if is_run else folder
    upload = Upload(packed, arguments.repository, arguments.private, arguments.revision)
    read_contents(str(packed))
    card = upload.card()
    if not arguments.dry_run:
        write(push(upload))
        return
    sizes = upload.files()
    width = max(map(len, sizes))
    write("\n".join(f"{name:<{width}}  {format_bytes(size):>9}" for name, size in sizes.items()))
    total = format_bytes(sum(sizes.values()))
    write(f"{'':<{width}}  {total:>9} to {arguments.repository}; a dry run, nothing was uploaded\n")
    write("\n".join(card.splitlines()[:HEAD]))
