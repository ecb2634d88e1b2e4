"""Contents of a packed checkpoint, read from its config and the headers of its files without weights or PyTorch."""

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
    """One tensor of a safetensors file.

    Attributes:
        dtype: the dtype by its name in the header, such as `F16`.
        shape: the sizes of all dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor, in bytes."""
        bits = re.search(r"\d+", self.dtype)  # BOOL has none, and takes a byte
        return prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer of a checkpoint.

    Attributes:
        name: name of the layer in the model.
        rows: rows of the weight.
        columns: columns of the weight.
        widths: width of each group, in the order of the columns.
        group_size: columns a group; the last group may have fewer.
        nbytes: bytes stored for the weight, without a bias.
    """

    name: str
    rows: int
    columns: int
    widths: tuple[int, ...]
    group_size: int
    nbytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def weight_bits(self) -> int:
        """Sum of the widths of all the weights."""
        sizes = [min(self.group_size, self.columns - start) for start in range(0, self.columns, self.group_size)]
        return self.rows * sum(width * size for width, size in zip(self.widths, sizes, strict=True))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the weight, scales and all, over the number of its weights."""
        return 8 * self.nbytes / self.weights

    @property
    def in_block(self) -> bool:
        """Whether the layer belongs to a transformer block, whose name holds a number; embedding and head do not."""
        return bool(_list_path(self.name))

    @property
    def groups(self) -> dict[int, int]:
        """Number of groups of each width."""
        return dict(sorted(Counter(self.widths).items()))


def _list_path(name: str) -> str:
    """Return the dotted path of the list that a layer or tensor lies in, such as `model.layers`; "" if it is in none.

    The first list counts: that of the blocks, not of the experts within one.
    """
    found = re.match(r"(.+?)\.\d+\.", name)
    return found[1] if found else ""


@dataclass(frozen=True)
class CheckpointContents:
    """The contents of a packed checkpoint on this machine.

    Attributes:
        folder: folder of the checkpoint.
        config: content of config.json.
        layers: packed layers, in the order of the blocks.
        others: tensors that are not packed, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: tuple[PackedLayer, ...]
    others: Mapping[str, StoredTensor]

    @cached_property
    def block_layers(self) -> tuple[PackedLayer, ...]:
        """Packed layers of the transformer blocks."""
        return tuple(layer for layer in self.layers if layer.in_block)

    @property
    def weights(self) -> int:
        """Number of weights in the packed layers of the blocks."""
        return sum(layer.weights for layer in self.block_layers)

    @property
    def average_bits(self) -> float:
        """Average width of the weights in the blocks."""
        return sum(layer.weight_bits for layer in self.block_layers) / self.weights

    @property
    def packed_share(self) -> float:
        """Share of the weights in the blocks that is packed."""
        blocks = {_list_path(layer.name) for layer in self.block_layers}
        others = sum(prod(tensor.shape) for name, tensor in self.others.items() if _list_path(name) in blocks)
        return self.weights / (self.weights + others)

    @property
    def block_bytes(self) -> int:
        """Bytes stored for the packed layers of the blocks."""
        return sum(layer.nbytes for layer in self.block_layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the packed layers of the blocks, scales and all, over the number of their weights."""
        return 8 * self.block_bytes / self.weights

    @property
    def embedding_and_head_bytes(self) -> int:
        """Bytes stored for a packed embedding and a packed head."""
        return sum(layer.nbytes for layer in self.layers) - self.block_bytes

    @property
    def other_bytes(self) -> int:
        """Bytes stored for the tensors that are not packed."""
        return sum(tensor.nbytes for tensor in self.others.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all the tensors of the checkpoint."""
        return self.block_bytes + self.embedding_and_head_bytes + self.other_bytes

    @property
    def context_length(self) -> int | None:
        """How many positions the model was made for, if its configuration says; GPT-2 calls it `n_positions`."""
        config = self.config.get("text_config", self.config)
        found = config.get("max_position_embeddings", config.get("n_positions"))
        return found if isinstance(found, int) else None

    @property
    def full_size_bytes(self) -> int:
        """Bytes of the full-precision model at 16 bits."""
        return int(self.config["quantization_config"]["full_size_bytes"])

    @property
    def compression(self) -> float:
        """Size of the full-precision model at 16 bits over that of the checkpoint."""
        return self.full_size_bytes / self.size_bytes


def checkpoint_folder(path: str) -> Path:
    """Return the folder of a checkpoint; a path that is not a folder is taken as a hub id and downloaded.

    Raises:
        InputError: if there is neither such a folder nor such a repository on the hub, or the download fails.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the folder of a packed checkpoint")
    if not re.fullmatch(HUB_ID, path):
        raise InputError(f"{path} does not exist; give the folder of a packed checkpoint, or a hub id org/name")
    # Slow to import, and not needed for a local folder.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            HfApi().model_info(path, timeout=10)  # fails at once, where a download would try again and again
        # The config comes first: a model that is not packed may have a hundred gigabytes.
        _read_config(Path(hf_hub_download(path, "config.json")).parent)
        return Path(snapshot_download(path, ignore_patterns=["*.bin", "*.pt", "*.pth"]))
    except (OSError, HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        if is_full(error):
            raise InputError(
                f"{path}: no space is left to download it; free some, or set HF_HOME to another disk"
            ) from error
        reason = first_line(error)
        raise InputError(
            f"{path} is not a folder on this machine and cannot be downloaded from the hub ({reason}); "
            "check the path, the hub id, the network and your login"
        ) from error


def read_contents(path: str) -> CheckpointContents:
    """Read the contents of the checkpoint at `path`, a folder or a hub id.

    Raises:
        InputError: if it is not a packed checkpoint, or a damaged one.
    """
    folder = checkpoint_folder(path)
    config = _read_config(folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open(folder / name)) for name in weight_file_names(folder)}
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
    """Return the content of config.json, or raise InputError if it is not that of a packed checkpoint."""
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


def weight_file_names(folder: Path) -> list[str]:
    """Return the names of the model's safetensors files, from the index if there is one."""
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
        raise InputError(f"{index} names {wrong[0]!r}, which is not a safetensors file; download the checkpoint again")
    return sorted(names)


def _open(file: Path) -> safe_open:
    """Open a safetensors file, or raise InputError with a remedy."""
    if not file.is_file():
        raise InputError(f"{file} is missing; export or download the checkpoint again")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} cannot be read: you lack the permission; change the file's mode or owner")
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({error}); export or download the checkpoint again") from error


def _header(file: safe_open, key: str) -> StoredTensor:
    """Return the dtype and shape of a tensor of an open file."""
    view = file.get_slice(key)
    return StoredTensor(view.get_dtype(), tuple(view.get_shape()))


def _read_layers(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], places: Mapping[str, safe_open]
) -> Iterator[PackedLayer]:
    """Yield the packed layers, or raise an error if config.json and the stored tensors do not fit together.

    Args:
        quantization: the `quantization_config` of config.json.
        stored: all tensors of the files by name.
        places: the open file that holds each tensor, by the tensor's name.
    """
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
    """Return a sort key that puts `layers.10` after `layers.9`: text and numbers in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
