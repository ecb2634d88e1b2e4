"""Models to be run one block at a time: weights stay on the disk, or are converted when a block is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from slimplus.models.architectures import blocks_path, find_blocks
from slimplus.models.gguf_tensors import GgufTensors
from slimplus.models.loading import UNBUILDABLE, ModelSource, build_on_meta
from slimplus.models.source_files import stored_weights

LoadBlock = Callable[[int], nn.Module]
"""`number of a block -> the block with its weights`, which belong to the caller."""

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Dtype as the header of a safetensors file calls it → the same of PyTorch."""


def open_model(source: ModelSource) -> tuple[PreTrainedModel, LoadBlock | None]:
    """Load a model on the CPU to be run one block at a time, so that its weights stay on the disk.

    Weights that a safetensors file holds as they are used are memory-mapped: they take no memory of this process, and
    the processes of a machine share them. Where blocks have to be converted, from a GGUF file or to another dtype, they
    stay on the meta device, and a function is returned that loads one of them.

    Raises:
        ModelLoadError: if the model cannot be loaded exactly, or holds NaN or infinity; the function raises it too.
        TemporaryFailure: if the disk is full.
    """
    config = source.config()
    skeleton = build_on_meta(config) if source.gguf_file else source.load(device_map={"": "meta"})[0]
    if _holds_blocks(source, skeleton):
        return source.model(), None
    blocks = len(find_blocks(skeleton))
    tensors = GgufTensors(_gguf_path(source, source.gguf_file), skeleton, blocks) if source.gguf_file else None
    parts = _Parts(source, config, blocks_path(skeleton), blocks, tensors)
    return parts.load(None), lambda index: find_blocks(parts.load(index))[index]


def _holds_blocks(source: ModelSource, skeleton: PreTrainedModel) -> bool:
    """Return whether safetensors files hold the tensors of all blocks under their names and in their dtypes."""
    if source.gguf_file:
        return False
    stored, prefix = stored_weights(source.weight_files()), f"{blocks_path(skeleton)}."
    return all(
        prefix + name in stored and STORED.get(stored[prefix + name].dtype) == parameter.dtype
        for name, parameter in find_blocks(skeleton).named_parameters()
    )


def _gguf_path(source: ModelSource, name: str) -> Path:
    """Return the GGUF file on this machine."""
    if Path(source.path).is_dir():
        return Path(source.path, name)
    return Path(hf_hub_download(source.path, name, revision=source.revision))


@dataclass(frozen=True)
class _Parts:
    """Loader of parts of a model.

    Attributes:
        source: where the model comes from.
        config: the model's configuration.
        path: path of the list of blocks.
        blocks: number of blocks.
        tensors: reader of the GGUF file, if the weights are in one.
    """

    source: ModelSource
    config: PretrainedConfig
    path: str
    blocks: int
    tensors: GgufTensors | None

    def load(self, index: int | None) -> PreTrainedModel:
        """Return the model with the weights of one block, or of all but the blocks, and the others on the meta device.

        Args:
            index: number of the block; None for what lies outside the blocks.
        """
        places = {"": "cpu" if index is None else "meta"}
        # Each block is named, since transformers takes the beginning of the name model.layers.10 for model.layers.1.
        places |= {f"{self.path}.{number}": "cpu" if number == index else "meta" for number in range(self.blocks)}
        arguments: dict[str, Any] = {"config": self.config, "device_map": _Placement(places)}
        source, tensors = self.source, self.tensors
        if tensors is None or not tensors.decodes:
            model, info = source.load(**arguments)
        else:
            try:
                arguments["state_dict"] = tensors.read(index, getattr(torch, source.loaded_dtype))
            except UNBUILDABLE as error:
                raise source.explain(error) from error
            model, info = source.load_as(type(tensors.model), None, **arguments)
        missing = [name for name in info["missing_keys"] if _placed(name, places) == "cpu"]
        source.check({**info, "missing_keys": missing})
        return source.finished(model, lambda other: replace(self, source=other).load(index))


class _Placement(dict[str, str]):
    """Beginning of a tensor's name → its device; transformers sees one device, so that it attaches no hooks."""

    def values(self) -> Any:
        return ["meta"]


def _placed(name: str, places: Mapping[str, str]) -> str:
    """Return the device of a tensor: that of the longest beginning of its name."""
    return places[max((start for start in places if name.startswith(start)), key=len)]
