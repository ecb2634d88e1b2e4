"""An environment that holds nothing but torch, transformers, safetensors and what these depend on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BASE = ("torch", "transformers", "safetensors")
TRAINING = ("lightning", "deepspeed", "datasets", "torchmetrics", "bitsandbytes", "pydantic", "tensorboard", "wrapt")


def distributions() -> dict[str, Distribution]:
    """The installed distributions that `BASE` needs, itself included, by name."""
    found: dict[str, Distribution] = {}
    waiting = list(BASE)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found[name] = distribution(name)
            waiting += _requirements(found[name])
    return found


def _requirements(of: Distribution) -> Iterator[str]:
    for requirement in map(Requirement, of.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                distribution(requirement.name)
            except PackageNotFoundError:  # such as CUDA's libraries, beside a CPU build of torch
                continue
            yield requirement.name


def link_libraries(folder: Path) -> None:
    """Fills `folder` with links to what is installed here for those distributions."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in distributions().values():
        tops = {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(each.locate_file(top))))


def environment(folder: Path) -> dict[str, str]:
    """For `python -S`, which then sees the standard library and `folder` alone."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


PYTHON = (sys.executable, "-S")
