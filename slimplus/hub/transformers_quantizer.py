"""The `slimplus` quantization method of transformers: `from_pretrained` builds packed layers.

Imported while `transformers` itself is being imported (see `slimplus/__init__.py`): from transformers it may import
only what `transformers.quantizers` itself rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimplus.format.checks import check_packed
from slimplus.hub.checks import (
    check_architecture,
    check_other_tensors,
    check_packed_tensors,
    check_quantization,
    read_headers,
)
from slimplus.hub.contents import METHOD
from slimplus.nn import PackedEmbedding, PackedLinear, TiedHead, prepare_inference
from slimplus.nn.packed_linear import offloading_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SlimplusConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        bits: average bits of the groups, as they were asked for; what they are is in `modules`.
        group_size: columns a group.
        modules: name of each packed layer → number of its groups of each width. Shapes follow from it, and they are
            needed before any tensor is read. An embedding is packed if it is named; a head that is tied to it then
            shares its packed weight.
        method: how the weights were quantized.
        shapes: name of each packed layer → rows and columns of its weight, which the packed tensors hold only rounded
            up; for what reads a checkpoint without building the model.
        full_size_bytes: of the full-precision model at 16 bit.
        scale_bits: 8 or 16, those that a scale takes in every packed layer.
    """

    def __init__(
        self,
        bits: int,
        group_size: int,
        modules: Mapping[str, Mapping[Any, int]],
        method: str,
        shapes: Mapping[str, Sequence[int]],
        full_size_bytes: int,
        scale_bits: int = 16,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.bits, self.group_size, self.method, self.scale_bits = bits, group_size, method, scale_bits
        self.modules = {
            name: {int(width): count for width, count in counts.items()} for name, counts in modules.items()
        }
        self.shapes = {name: list(shape) for name, shape in shapes.items()}
        self.full_size_bytes = full_size_bytes

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """From JSON.

        Raises:
            ValueError: naming the key, for what no packed checkpoint can say.
        """
        check_quantization(config_dict)
        return super().from_dict(config_dict, *args, **kwargs)


class SlimplusQuantizer(HfQuantizer):
    """Swaps packed layers in before the weights are loaded, and checks what a checkpoint says before it is used."""

    requires_calibration = True
    quantization_config: SlimplusConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the architecture; no other method sees it before the model is built."""
        check_architecture(config.to_dict(), self.quantization_config.modules)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        swap_packed_layers(model, config)
        stored = read_headers(checkpoint_files or [])
        check_packed_tensors(stored, config.group_size, config.modules, config.shapes, config.scale_bits)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_other_tensors(stored, shapes, model.all_tied_weights_keys)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_packed_layers(model)
        prepare_inference(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Packed tensors are ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """Packed products are operators of their own: with a static cache, transformers may compile the decoding."""
        return True


def swap_packed_layers(model: PreTrainedModel, config: SlimplusConfig) -> None:
    """Replace the linear layers and embeddings that `config` names by empty packed ones, on the meta device.

    Raises:
        ValueError: where the model has no such layer, or its size does not fit.
    """
    for name, counts in config.modules.items():
        try:
            with torch.device("meta"):
                packed = _empty_packed(model.get_submodule(name), config, counts)
            if packed.shape != (rows_and_columns := tuple(config.shapes[name])):
                raise ValueError(f"the model has {packed.shape} there, and shapes {rows_and_columns}")
        except AttributeError:
            raise ValueError(f"quantization_config.modules: the model has no layer {name}") from None
        except ValueError as error:
            raise ValueError(f"quantization_config.modules: {name}: {error}") from error
        model.set_submodule(name, packed)
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and isinstance(embedding, PackedEmbedding):
        model.set_output_embeddings(TiedHead(embedding, model.get_output_embeddings().bias))
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}  # transformers' tying needs weights


def check_packed_layers(model: nn.Module) -> None:
    """Check the tensors of all packed layers, those that accelerate keeps elsewhere included.

    Raises:
        ValueError: naming the layer and the tensor.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding):
            tensors = layer.packed_tensors()
            if layer.scales.is_meta:
                if (hook := offloading_hook(layer)) is None:  # nothing has been loaded, or it is that of another layer
                    continue
                tensors = {key: hook.weights_map[key] for key in tensors}
            try:
                check_packed(tensors, layer.shape, layer.group_size, layer.bit_counts)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _empty_packed(
    layer: nn.Module, config: SlimplusConfig, counts: Mapping[int, int]
) -> PackedLinear | PackedEmbedding:
    group_size, scale_bits = config.group_size, config.scale_bits
    if isinstance(layer, nn.Embedding):
        rows, columns = layer.num_embeddings, layer.embedding_dim
        return PackedEmbedding(rows, columns, group_size, counts, layer.weight.dtype, scale_bits)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"a {type(layer).__name__} cannot be packed, only a linear layer or an embedding")
    bias, dtype = layer.bias is not None, layer.weight.dtype
    return PackedLinear(layer.in_features, layer.out_features, group_size, counts, bias, dtype, scale_bits)


def register() -> None:
    """Make transformers know the method; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SlimplusConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SlimplusQuantizer)
