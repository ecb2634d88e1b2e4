"""Bit allocations in files: allocation.json of a run, and the group-wise precisions that SliM-LLM's authors publish."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimplus.format.affine import MAX_BITS, weight_bits
from slimplus.run_dir.directory import RunDirectory
from slimplus.utils.errors import InputError

KEY, REMEDY = "quantization.allocation", "give the allocation.json of a run, or a published group-precision .pt file"
LARGEST = 2**26  # bytes; a 70B model has 9 million groups
# What zipfile, json and torch.load raise for files of another format.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, zipfile.BadZipFile)


def read_allocation(path: str | Path, group_size: int, blocks: str) -> dict[str, list[int]]:
    """Return the width of each group of each linear layer, by the layer's name in the model.

    Args:
        path: an `allocation.json`, or a file of https://huggingface.co/AaronHuangWei/SliM-LLM_group-precision, which
            `torch.save` made of block index → layer name → widths.
        group_size: group size of the run. Published files do not hold theirs, which is in their folder's name.
        blocks: path of the blocks in the model, such as `model.layers`; published files only number the blocks.

    Raises:
        InputError: if the file is no allocation, or one for another group size.
    """
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(f"{KEY}: {path} is too large for an allocation; {REMEDY}")
        bits = _published(file, blocks) if zipfile.is_zipfile(file) else _own(file, group_size)
    except InputError:  # which is a ValueError, as in UNREADABLE
        raise
    except UNREADABLE as error:
        raise InputError(f"{KEY}: {path} is not an allocation ({error!r}); {REMEDY}") from error
    except pickle.UnpicklingError as error:  # raised for code in the pickle, which is not run
        raise InputError(f"{KEY}: {path} holds more than plain widths; {REMEDY}") from error
    if not isinstance(bits, dict) or not all(isinstance(widths, list) for widths in bits.values()):
        raise InputError(f"{KEY}: {path} holds no list of widths for each layer; {REMEDY}")
    if not all(type(width) is int and 1 <= width <= MAX_BITS for widths in bits.values() for width in widths):
        raise InputError(f"{KEY}: {path} holds widths outside 1 to {MAX_BITS}; {REMEDY}")
    return bits


def check_allocation(bits: Mapping[str, list[int]], expected: Mapping[str, int]) -> None:
    """Check that an allocation is for the model at hand.

    Args:
        bits: layer → width of each group.
        expected: layer → number of groups in the model.

    Raises:
        InputError: if a layer is missing, unknown, or has another number of groups.
    """
    found = {name: len(widths) for name, widths in bits.items()}
    for name in (*expected, *found):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{KEY}: {name} has {found.get(name, 0)} groups in the file and {expected.get(name, 0)} in the model; "
                "give the allocation of the same model and group size"
            )


def average_bits(bits: Mapping[str, list[int]], layers: Mapping[str, nn.Linear], group_size: int) -> float:
    """Return the average width of the weights of `layers`, given the width of each group in `bits`."""
    weights = sum(layer.weight.numel() for layer in layers.values())
    widths = (weight_bits(torch.tensor(bits[name]), group_size, *layer.weight.shape) for name, layer in layers.items())
    return sum(widths) / weights


def _own(file: Path, group_size: int) -> Any:
    """Return what an allocation.json holds as widths; the caller checks it."""
    content = json.loads(file.read_text())
    bits, found = content["bits"], content["group_size"]
    if found != group_size:
        raise InputError(
            f"{KEY}: {file} is for group_size {found!r}, not {group_size}; set quantization.group_size={found!r}"
        )
    return bits


def _published(file: Path, blocks: str) -> dict[str, Any]:
    """Return what a published file holds as widths; the caller checks it."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    return {
        f"{blocks}.{int(index)}.{name}": widths for index, layers in content.items() for name, widths in layers.items()
    }


def write_allocation(
    run: RunDirectory,
    bits: Mapping[str, list[int]],
    embedding_and_head_bits: Mapping[str, int],
    target_bits: int,
    group_size: int,
) -> None:
    """Write `allocation.json`.

    Args:
        run: the run directory.
        bits: layer → width of each group, in column order, for the linear layers of the blocks.
        embedding_and_head_bits: name → bits of the packed layers outside the blocks.
        target_bits: average width that the recipe asks for.
        group_size: number of columns in a group.
    """
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(widths)}" for name, widths in bits.items())
    run.write(
        "allocation.json",
        f'{{\n  "target_bits": {target_bits},\n  "group_size": {group_size},\n'
        f'  "outer_bits": {json.dumps(dict(embedding_and_head_bits))},\n  "bits": {{\n{lines}\n  }}\n}}\n',
    )
