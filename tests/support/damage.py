"""Damage to files.

Run as a script: damaged checkpoints are loaded one after the other, within bounds of memory and time.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch

import slimplus
from tests.support.fuzzing import damaged, refusal

WEIGHTS = "model.safetensors"


def header_size(content: bytes | bytearray) -> int:
    """Of a safetensors file, its length included."""
    return 8 + int.from_bytes(content[:8], "little")


LOADS, MEMORY, SECONDS = 400, 12 * 2**30, 20


def damage_quantization(folder: Path, generator: random.Random) -> None:
    """One value of the `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = damaged(config["quantization_config"], generator.choice)
    (folder / "config.json").write_text(json.dumps(config))


def damage_architecture(folder: Path, generator: random.Random) -> None:
    """One value of config.json besides."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(damaged(config, generator.choice) | quantization))


def damage_header(folder: Path, generator: random.Random) -> None:
    """One bit of the header, or the end of the file."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    else:
        content[generator.randrange(header_size(content))] ^= 1 << generator.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


def damage_tensors(folder: Path, generator: random.Random) -> None:
    """A few bits behind the header."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(5):
        content[generator.randrange(header_size(content), len(content))] ^= 1 << generator.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


DAMAGE = (damage_quantization, damage_architecture, damage_header, damage_tensors)


def load_and_run(folder: Path) -> None:
    slimplus.load(folder)(torch.ones(1, 4, dtype=torch.int64))


def campaign(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Any error but a clear one ends it."""
    slimplus.load(checkpoint)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    generator = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(LOADS):
        copy = shutil.copytree(checkpoint, folder / str(number))
        DAMAGE[number % len(DAMAGE)](copy, generator)
        signal.alarm(SECONDS)
        said = refusal(partial(load_and_run, copy))
        signal.alarm(0)
        outcomes["loaded" if said is None else "refused"] += 1
        shutil.rmtree(copy)
    return outcomes


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
