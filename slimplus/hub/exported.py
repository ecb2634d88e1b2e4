"""What all exports of a packed checkpoint share: its tensors, read one at a time, and the record of what is exact."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slimplus.format.affine import QuantizedWeight
from slimplus.format.checks import check_packed
from slimplus.format.planes import unpack
from slimplus.hub.contents import INDEX_FILE, CheckpointContents, PackedLayer, weight_file_names
from slimplus.utils.errors import InputError

MODEL_FILES = ("config.json", INDEX_FILE, "README.md")  # written anew, or true of the packed checkpoint alone


class PackedTensors:
    """The tensors of a packed checkpoint, of which only the one that is asked for is in memory.

    Args:
        contents: contents of the checkpoint.
    """

    def __init__(self, contents: CheckpointContents) -> None:
        self._places: dict[str, Path] = {}
        self._names: dict[str, list[str]] = {}  # of the tensors in each layer
        for file in [contents.folder / name for name in weight_file_names(contents.folder)]:
            with safe_open(file, framework="pt") as stored:
                self._places |= dict.fromkeys(stored.keys(), file)
        for name in self._places:
            self._names.setdefault(name.rpartition(".")[0], []).append(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the files."""
        with safe_open(self._places[name], framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor

    def read_layer(self, layer: PackedLayer) -> QuantizedWeight:
        """Return the weight of a packed layer.

        Raises:
            InputError: if the layer's tensors are damaged.
        """
        names = [name for name in self._names.get(layer.name, []) if not name.endswith(".bias")]
        tensors = {name.rpartition(".")[2]: self.read(name) for name in names}
        try:
            check_packed(tensors, (layer.rows, layer.columns), layer.group_size)
        except ValueError as error:
            raise InputError(f"{layer.name}: {error}; export or download the checkpoint again") from error
        return unpack(tensors, layer.rows, layer.columns, layer.group_size)


def cast_whole(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in `dtype`.

    Raises:
        InputError: naming the tensor, if it holds values that `dtype` cannot.
    """
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise InputError(f"{name} holds values that {dtype} cannot; give --dtype bfloat16 or float32")
    return cast


def write_beside(
    contents: CheckpointContents, folder: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    """Write what stands beside the weights: the tokenizer and other files, and config.json.

    Args:
        contents: contents of the packed checkpoint.
        folder: folder of the weights.
        dtype: dtype of the weights.
        quantization: the `quantization_config` of config.json, if there is one.
    """
    for file in contents.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in MODEL_FILES:
            shutil.copy(file, folder)
    config = {key: value for key, value in contents.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass
class Exactness:
    """How exactly a format holds the tensors of a checkpoint.

    Attributes:
        counts: number of tensors, by what they are, how they are stored and how exact that is.
    """

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, what: str, stored_as: str, exact: str) -> None:
        """Count one tensor."""
        self.counts[what, stored_as, exact] += 1

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a table, head first: tensors, their number, what they are stored as, and how exact that is."""
        head = ("tensors", "number", "stored as", "exact")
        return [head, *((what, str(number), stored, exact) for (what, stored, exact), number in self.counts.items())]
