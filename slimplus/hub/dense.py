"""Export of a packed checkpoint to an ordinary one, which any tool that reads the hub's layout loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from slimplus.hub.checkpoint import write_shards
from slimplus.hub.contents import INDEX_FILE, CheckpointContents
from slimplus.hub.exported import Exactness, PackedTensors
from slimplus.utils.errors import InputError

MODEL_FILES = ("config.json", INDEX_FILE, "README.md")  # written anew, or true of the packed checkpoint alone


def export_dense(contents: CheckpointContents, folder: Path, dtype: torch.dtype) -> Exactness:
    """Write a checkpoint with ordinary weights, layer by layer.

    Args:
        contents: contents of the packed checkpoint.
        folder: empty folder to write to.
        dtype: dtype of all floating-point tensors.

    Raises:
        InputError: if a value is too large for `dtype`, or a packed layer is damaged.
        OSError: if the disk is full or cannot be written.
    """
    exactness = Exactness()
    write_shards(folder, _tensors(contents, dtype, exactness))
    for file in contents.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in MODEL_FILES:
            shutil.copy(file, folder)
    config = {key: value for key, value in contents.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return exactness


def _tensors(contents: CheckpointContents, dtype: torch.dtype, exactness: Exactness) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the ordinary checkpoint with their names."""
    stored, name_of_dtype = PackedTensors(contents), str(dtype).removeprefix("torch.")
    for name in contents.others:
        tensor = stored.read(name)
        cast = _cast(name, tensor, dtype) if tensor.is_floating_point() else tensor
        exactness.add("not packed", name_of_dtype, "yes" if torch.equal(cast.to(tensor.dtype), tensor) else "rounded")
        yield name, cast
    for layer in contents.layers:
        weight = stored.read_layer(layer).dequantize()
        cast = _cast(layer.name, weight, dtype)
        exactness.add("packed", name_of_dtype, "yes" if torch.equal(cast.float(), weight) else "rounded once")
        yield f"{layer.name}.weight", cast.contiguous()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in `dtype`, or raise InputError if it does not fit."""
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise InputError(f"{name} holds values that {dtype} cannot; give --dtype bfloat16 or float32")
    return cast
