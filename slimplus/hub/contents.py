"""What a packed checkpoint holds, read from its config and the headers of its files: no weights, no PyTorch."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slimplus.utils.errors import InputError, first_line, is_full

METHOD = "slimplus"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; `dtype` as its header names it, such as `F16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # BOOL has none, and takes a byte
        return prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer.

    Attributes:
        name: its name in the model.
        rows: of its weight.
        columns: of its weight.
        widths: width of each group, in column order.
        group_size: columns a group; the last one may have fewer.
        nbytes: all that is stored for the weight, so no bias.
    """

    name: str
    rows: int
    columns: int
    widths: tuple[int, ...]
    group_size: int
    nbytes: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def weight_bits(self) -> int:
        """Widths of all the weights, summed."""
        sizes = [min(self.group_size, self.columns - start) for start in range(0, self.columns, self.group_size)]
        return self.rows * sum(width * size for width, size in zip(self.widths, sizes, strict=True))

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the weight, over its elements."""
        return 8 * self.nbytes / self.weights

    @property
    def in_block(self) -> bool:
        """Whether it belongs to a transformer block, which a number names; embedding and head do not."""
        return re.search(r"\.\d+\.", self.name) is not None

    @property
    def groups(self) -> dict[int, int]:
        """Width → number of groups that have it."""
        return dict(sorted(Counter(self.widths).items()))


@dataclass(frozen=True)
class CheckpointContents:
    """A packed checkpoint on this machine.

    Attributes:
        folder: where it lies.
        config: content of config.json.
        layers: the packed layers, blocks by number.
        others: the tensors that are not packed, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: tuple[PackedLayer, ...]
    others: Mapping[str, StoredTensor]

    @cached_property
    def block_layers(self) -> tuple[PackedLayer, ...]:
        """The packed layers of the transformer blocks, which the averages below are of."""
        return tuple(layer for layer in self.layers if layer.in_block)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.block_layers)

    @property
    def average_bits(self) -> float:
        return sum(layer.weight_bits for layer in self.block_layers) / self.weights

    @property
    def block_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.block_layers)

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the packed layers of the blocks, over their weights."""
        return 8 * self.block_bytes / self.weights

    @property
    def outer_bytes(self) -> int:
        """Everything stored for an embedding and a head that are packed as well."""
        return sum(layer.nbytes for layer in self.layers) - self.block_bytes

    @property
    def other_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.others.values())

    @property
    def size_bytes(self) -> int:
        return self.block_bytes + self.outer_bytes + self.other_bytes

    @property
    def full_size_bytes(self) -> int:
        """The model at 16 bit, as it was before."""
        return int(self.config["quantization_config"]["full_size_bytes"])

    @property
    def compression(self) -> float:
        return self.full_size_bytes / self.size_bytes


def checkpoint_folder(path: str) -> Path:
    """The folder that `path` names; what is no folder here is taken for a hub id, and downloaded.

    Raises:
        InputError: if there is no such folder, and no such repository either.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the folder of a packed checkpoint")
    if not re.fullmatch(HUB_ID, path):
        raise InputError(f"{path} does not exist; give the folder of a packed checkpoint, or a hub id org/name")
    from huggingface_hub import hf_hub_download, snapshot_download  # takes a while, and a local folder does not need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        _read_config(Path(hf_hub_download(path, "config.json")).parent)  # a dense model may have a hundred gigabytes
        return Path(snapshot_download(path, ignore_patterns=["*.bin", "*.pt", "*.pth"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        if is_full(error):
            raise InputError(
                f"{path}: no space is left to download it; free some, or set HF_HOME to another disk"
            ) from error
        reason = first_line(error)
        raise InputError(
            f"{path} is no folder here and cannot be had from the hub ({reason}); "
            "check the path, the hub id, the network and your login"
        ) from error


def read_contents(path: str) -> CheckpointContents:
    """What the checkpoint at `path`, a folder or a hub id, holds.

    Raises:
        InputError: if it is no packed checkpoint, or a damaged one.
    """
    folder = checkpoint_folder(path)
    config = _read_config(folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open(folder / name)) for name in _file_names(folder)}
        places = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118, not a mapping
        stored = {key: _header(file, key) for key, file in places.items()}
        try:
            layers = tuple(_read_layers(config["quantization_config"], stored, places))
            if not any(layer.in_block for layer in layers):
                raise ValueError("no packed layer lies in a transformer block")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{folder}: config.json and the tensors do not fit together ({error}); the checkpoint is damaged: "
                "export or download it again"
            ) from error
    packed = {layer.name for layer in layers}
    others = {
        key: tensor for key, tensor in stored.items() if key.rpartition(".")[0] not in packed or key.endswith(".bias")
    }
    return CheckpointContents(folder, config, layers, others)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "packed"
        hint = f"give {inner}" if (inner / file.name).is_file() else "give a folder such as RUN_DIR/packed"
        raise InputError(f"{folder} holds no checkpoint: config.json is missing; {hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}); export or download the checkpoint again") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise InputError(f"{folder} is not a packed slimplus checkpoint; load it with transformers")
    return config


def _file_names(folder: Path) -> list[str]:
    """The safetensors files, from the index if there is one: other files in the folder are not the model's."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} cannot be read ({error}); export or download the checkpoint again") from error
    if wrong := [
        name for name in names if not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name))
    ]:
        raise InputError(f"{index} names {wrong[0]!r}, which is no safetensors file; download the checkpoint again")
    return sorted(names)


def _open(file: Path) -> safe_open:
    if not file.is_file():
        raise InputError(f"{file} is missing; export or download the checkpoint again")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} cannot be read: its permissions do not let you")
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({error}); export or download the checkpoint again") from error


def _header(file: safe_open, key: str) -> StoredTensor:
    view = file.get_slice(key)
    return StoredTensor(view.get_dtype(), tuple(view.get_shape()))


def _read_layers(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], places: Mapping[str, safe_open]
) -> Iterator[PackedLayer]:
    for key in ("group_size", "full_size_bytes"):
        if int(quantization[key]) < 1:
            raise ValueError(f"{key} is {quantization[key]}")
    if not quantization["modules"]:
        raise ValueError("there are no packed layers")
    group_size = int(quantization["group_size"])
    tensors: dict[str, dict[str, StoredTensor]] = {name: {} for name in quantization["modules"]}
    for key, tensor in stored.items():
        owner, _, own = key.rpartition(".")
        if owner in tensors and own != "bias":
            tensors[owner][own] = tensor
    for name in sorted(tensors, key=_natural_order):  # transformers writes the keys of a config in alphabetical order
        expected = quantization["modules"][name]
        stored_widths, order = (
            places[f"{name}.{own}"].get_tensor(f"{name}.{own}").tolist() for own in ("group_bits", "group_index")
        )
        widths = tuple(width for _, width in sorted(zip(order, stored_widths, strict=True)))
        rows, columns = map(int, quantization["shapes"][name])
        layer = PackedLayer(
            name, rows, columns, widths, group_size, sum(tensor.nbytes for tensor in tensors[name].values())
        )
        if layer.groups != {int(width): count for width, count in expected.items()}:
            raise ValueError(f"{name} has groups {layer.groups} among its tensors")
        if rows < 1 or len(order) != -(-columns // group_size) or sorted(order) != list(range(len(order))):
            raise ValueError(f"{name}.group_index does not order the groups of {rows} x {columns} weights")
        yield layer


def _natural_order(name: str) -> list[str | int]:
    """`layers.10` after `layers.9`. Numbers and text alternate, so that only like meets like."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
