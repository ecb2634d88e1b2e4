"""Export of a packed checkpoint to an ordinary one, which any tool that reads the hub's layout loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from slimplus.hub.checkpoint import write_shards
from slimplus.hub.checks import check_architecture
from slimplus.hub.contents import CheckpointContents, PackedLayer
from slimplus.hub.exported import Exactness, PackedTensors, cast_whole, write_beside
from slimplus.models.architectures import expert_stacks
from slimplus.models.loading import UNBUILDABLE, build_on_meta
from slimplus.utils.errors import InputError, named_first_line


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
    write_beside(contents, folder, dtype, None)
    return exactness


def _tensors(contents: CheckpointContents, dtype: torch.dtype, exactness: Exactness) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the ordinary checkpoint with their names."""
    stored, name_of_dtype = PackedTensors(contents), str(dtype).removeprefix("torch.")
    stacks = _expert_stacks(contents)
    in_stacks = {layer.name for stack in stacks.values() for layer in stack.layers}

    def other(name: str) -> Tensor:
        tensor = stored.read(name)
        cast = cast_whole(name, tensor, dtype) if tensor.is_floating_point() else tensor
        exactness.add("not packed", name_of_dtype, "yes" if torch.equal(cast.to(tensor.dtype), tensor) else "rounded")
        return cast

    def weight(layer: PackedLayer) -> Tensor:
        dequantized = stored.read_layer(layer).dequantize()
        cast = cast_whole(layer.name, dequantized, dtype)
        exactness.add("packed", name_of_dtype, "yes" if torch.equal(cast.float(), dequantized) else "rounded once")
        return cast

    for name in contents.others:
        if name.removesuffix(".bias") not in in_stacks:
            yield name, other(name)
    for layer in contents.layers:
        if layer.name not in in_stacks:
            yield f"{layer.name}.weight", weight(layer).contiguous()
    for name, stack in stacks.items():
        stacked = torch.stack([weight(layer) for layer in stack.layers])
        yield name, (stacked.transpose(1, 2) if stack.transposed else stacked).contiguous()
        if stack.bias:
            yield f"{name}_bias", torch.stack([other(f"{layer.name}.bias") for layer in stack.layers])


@dataclass(frozen=True)
class _Stack:
    """Packed layers of experts that an ordinary checkpoint holds as one tensor.

    Attributes:
        layers: the layers, in the order of the experts.
        transposed: whether the tensor is `[experts, in, out]`, not `[experts, out, in]`.
        bias: whether there is a tensor of biases as well.
    """

    layers: list[PackedLayer]
    transposed: bool
    bias: bool


def _expert_stacks(contents: CheckpointContents) -> dict[str, _Stack]:
    """Return the packed layers of experts, by the name of the tensor that transformers has for them.

    Raises:
        InputError: if no model can be built from config.json, or it has other experts.
    """
    layers = {layer.name: layer for layer in contents.layers}
    if not any(name.rpartition(".")[2].isdigit() for name in layers):
        return {}
    try:
        check_architecture(contents.config, layers)
    except ValueError as error:
        raise InputError(f"{contents.folder}: {error}") from error
    values = {key: value for key, value in contents.config.items() if key != "quantization_config"}
    try:
        stacks = expert_stacks(build_on_meta(CONFIG_MAPPING[values["model_type"]].from_dict(values)))
    except UNBUILDABLE as error:
        raise InputError(f"{contents.folder}: config.json describes no model ({named_first_line(error)})") from error
    try:
        return {
            f"{name}.{key}": _Stack(
                [layers[f"{name}.{key}.{expert}"] for expert in range(stack.count)],
                stack.layout.transposed,
                stack.layout.bias,
            )
            for name, stack in stacks.items()
            for key in stack.layout.projections
            if f"{name}.{key}.0" in layers
        }
    except KeyError as error:
        raise InputError(f"{contents.folder}: config.json has more experts than are packed: {error}") from error
