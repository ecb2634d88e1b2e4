"""The `slimplus` quantization method of vLLM, by which vLLM serves packed checkpoints.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. The interfaces are
those of vLLM 0.32: https://docs.vllm.ai/en/stable/design/plugin_system/ and `register_quantization_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from slimplus.hub.contents import METHOD
from slimplus.hub.engine_layers import StoredLayer, is_outside, names_in, stored_layers
from slimplus.hub.vllm_layers import PackedLinearMethod, PackedVocabularyMethod, TiedHeadMethod

REORDERED = {"bloom"}
"""Model types whose model in vLLM moves the rows of q, k and v along the first dimension of whatever tensor it gets."""


class PackedConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's `quantization_config`.

    Args:
        layers: the packed layers of the checkpoint by name.
    """

    def __init__(self, layers: Mapping[str, StoredLayer]) -> None:
        super().__init__()
        self.layers = dict(layers)
        self._given: set[str] = set()  # names of the layers that vLLM has asked for

    def get_name(self) -> Any:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations: kernels multiply two of them, float32 is multiplied by dense weights."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability of Ampere, the first with bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files to read beside config.json: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Return the configuration that the `quantization_config` of config.json describes.

        Raises:
            ValueError: naming the key that is missing or wrong, or an expert, which vLLM does not take packed.
        """
        return cls(stored_layers(config, "vLLM"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the packed layers for a model of vLLM that names its layers otherwise than transformers does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method for the layer called `prefix`, or None for a layer that vLLM is to treat as its own.

        Raises:
            ValueError: naming the layer, if it is packed and vLLM cannot use it so.
        """
        prefix = prefix.removeprefix(".")  # some models put a point before a name without a parent
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        return self._linear_method(prefix) if isinstance(layer, LinearBase) else None

    def _linear_method(self, prefix: str) -> Any:
        if prefix in self.layers and _model_type() in REORDERED:
            raise ValueError(
                f"{prefix}: vLLM's {_model_type()} reorders rows before they are loaded, and would mix up packed ones; "
                "serve what `slimplus export --to dense` writes"
            )
        names = names_in(prefix, self.layers, self.packed_modules_mapping, "vLLM")
        self._given.update(names)
        return PackedLinearMethod([self.layers[name] for name in names]) if names else UnquantizedLinearMethod()

    def _vocabulary_method(self, layer: Any, prefix: str) -> Any:
        is_head = isinstance(layer, ParallelLMHead)
        name = prefix if prefix in self.layers else None if is_head else self._embedding_name(layer)
        tied = bool(getattr(get_current_vllm_config().model_config.hf_text_config, "tie_word_embeddings", False))
        if name is not None:
            self._given.add(name)
            return PackedVocabularyMethod(self.layers[name], is_head, tied)
        return TiedHeadMethod() if is_head and tied and self._outside() else None

    def _embedding_name(self, layer: Any) -> str | None:
        """Return the name of the packed embedding of this shape; many models of vLLM pass an empty prefix for it."""
        shape = layer.org_vocab_size, layer.embedding_dim
        names = [name for name in self._outside() if not name.endswith("head") and self.layers[name].shape == shape]
        return names[0] if len(names) == 1 else None

    def _outside(self) -> list[str]:
        """Return the names of the packed layers outside the blocks."""
        return [name for name in self.layers if is_outside(name)]

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return vLLM's own mapper; it is asked for when the model stands and before tensors are loaded.

        Raises:
            ValueError: naming a packed layer that vLLM's model has not asked for, as some do not ask for the embedding.
        """
        if get_pp_group().world_size == 1 and (missing := [name for name in self.layers if name not in self._given]):
            remedy = (
                "quantize with quantization.embedding_bits=null quantization.head_bits=null"
                if missing[0] in self._outside()
                else "serve what `slimplus export --to dense` writes"
            )
            raise ValueError(f"{missing[0]}: vLLM's model of this architecture does not take it packed; {remedy}")
        return super().get_checkpoint_weight_mapper()


def _model_type() -> str:
    return str(get_current_vllm_config().model_config.hf_text_config.model_type)


def register() -> None:
    """Register the method with vLLM; a second call does nothing."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(PackedConfig)
