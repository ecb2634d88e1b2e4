"""The tensors of a GGUF file, decoded one block at a time; transformers' own reader decodes all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import gguf as integration


@dataclass(frozen=True)
class GgufTensors:
    """Reader of the tensors of a GGUF file under the names that they have in a model.

    Names and layouts are turned into the model's by transformers' own functions.

    Attributes:
        file: the GGUF file.
        model: the model, which may lie on the meta device.
        blocks: number of its blocks.
    """

    file: Path
    model: PreTrainedModel
    blocks: int

    @cached_property
    def _reader(self) -> Any:
        import gguf  # an optional library

        return gguf.GGUFReader(self.file)

    @property
    def _architecture(self) -> str:
        return str(self._reader.fields["general.architecture"].contents())

    @property
    def decodes(self) -> bool:
        """Whether this architecture is decoded here; a few have another reader in transformers."""
        is_supported = getattr(integration, "is_gguf_arch_supported", None)
        return is_supported is None or not is_supported(self._architecture)

    @cached_property
    def _processor(self) -> Any:
        from transformers import modeling_gguf_pytorch_utils as library

        config = library.load_gguf_checkpoint(self.file)["config"]
        return library.TENSOR_PROCESSORS.get(self._architecture, library.TensorProcessor)(config=config)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name in the file → name in the model."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        # Every submodule of a model is searched for names, which takes minutes for a large one; few models need that.
        names: dict[str, str] = get_gguf_hf_weights_map(_WithoutChildren(self.model), self._processor)
        if any(tensor.name not in names for tensor in self._reader.tensors):
            names = get_gguf_hf_weights_map(self.model, self._processor)
        return names

    def read(self, index: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a block by their names in the model, cast to `dtype` as transformers casts them.

        Args:
            index: number of the block; None for the tensors outside the blocks.
            dtype: dtype of the tensors.
        """
        from gguf import dequantize

        names, processor = self._names, self._processor
        parsed: dict[str, Any] = {"config": processor.config, "tensors": {}}  # where some architectures put experts
        found: dict[str, Tensor] = parsed["tensors"]
        for tensor in self._reader.tensors:
            if _block_of(tensor.name, self.blocks) != index:
                continue
            weights = dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if result.name in names:
                found[names[result.name]] = torch.tensor(result.weights).to(dtype)
        return found


class _WithoutChildren:
    """A model of which transformers is to look at the names of the whole, not of its parts again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def config(self) -> PretrainedConfig:
        return self._model.config

    def state_dict(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(())


def _block_of(name: str, blocks: int) -> int | None:
    """Return the number of the block that a tensor belongs to, or None for a tensor outside the blocks."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found and int(found[1]) < blocks else None
