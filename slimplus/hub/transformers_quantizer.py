"""The `slimplus` quantization method of transformers, by which `from_pretrained` builds packed layers.

This module is imported while `transformers` itself is being imported (see `slimplus/__init__.py`). Of transformers it
may import only what `transformers.quantizers` imports as well.
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
    check_buffers,
    check_other_tensors,
    check_packed_tensors,
    check_quantization,
    read_headers,
)
from slimplus.hub.contents import METHOD
from slimplus.models.architectures import embedding_scale, linear_shape
from slimplus.nn import PackedEmbedding, PackedLinear, TiedHead, prepare_inference
from slimplus.nn.packed_linear import offloading_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SlimplusConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    Args:
        bits: average width that the recipe asked for; `modules` holds the actual widths.
        group_size: columns a group.
        modules: number of groups of each width, by the name of each packed layer. It fixes the shapes of the packed
            tensors before any is read. An embedding is packed if it is named here; a head that is tied to it shares
            its packed weight.
        method: name of the method that quantized the weights.
        shapes: rows and columns of the weight, by the name of each packed layer, for readers that do not build the
            model; the packed tensors have them only rounded up.
        full_size_bytes: bytes of the full-precision model at 16 bits.
        scale_bits: bits that a scale takes in every packed layer, 8 or 16.
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
        """Return the configuration that JSON values describe.

        Raises:
            ValueError: naming the key that is missing or wrong.
        """
        check_quantization(config_dict)
        return super().from_dict(config_dict, *args, **kwargs)


class SlimplusQuantizer(HfQuantizer):
    """The quantizer that transformers calls around the loading of a packed checkpoint.

    1. Before the model is built, the architecture in config.json is checked.
    2. Before weights are loaded, packed layers take the place of ordinary ones, and the stored tensors are checked
       against the model by their headers.
    3. After loading, the values of the packed tensors are checked, and the layers are made ready to multiply.
    """

    requires_calibration = True
    quantization_config: SlimplusConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the architecture, since no other hook of transformers runs before the model is built."""
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
        check_buffers({name: buffer for name, buffer in model.named_buffers() if name not in shapes})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_packed_layers(model)
        prepare_inference(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return True: packed tensors are saved as ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: packed layers have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile the decoding: packed products are operators that `torch.compile` knows."""
        return True


def swap_packed_layers(model: PreTrainedModel, config: SlimplusConfig) -> None:
    """Replace the linear layers and embeddings that `config` names by packed ones without data, on the meta device.

    Raises:
        ValueError: naming the layer, if the model has no such layer, or the layer has another shape.
    """
    for name, counts in config.modules.items():
        try:
            with torch.device("meta"):
                packed = _empty_packed(model.get_submodule(name), config, counts)
            if packed.shape != (rows_and_columns := tuple(config.shapes[name])):
                raise ValueError(f"the layer's weight is {packed.shape} in the model, but {rows_and_columns} in shapes")
        except AttributeError:
            raise ValueError(f"quantization_config.modules: the model has no layer {name}") from None
        except ValueError as error:
            raise ValueError(f"quantization_config.modules: {name}: {error}") from error
        model.set_submodule(name, packed)
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and isinstance(embedding, PackedEmbedding):
        model.set_output_embeddings(TiedHead(embedding, model.get_output_embeddings().bias))
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}  # transformers can tie only ordinary weights


def check_packed_layers(model: nn.Module) -> None:
    """Check the tensors of all packed layers, including those that accelerate has offloaded.

    Raises:
        ValueError: naming the layer and the tensor that is wrong.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding):
            tensors = layer.packed_tensors()
            if layer.scales.is_meta:
                if (hook := offloading_hook(layer)) is None:  # nothing is loaded yet, or the layer shares a weight
                    continue
                tensors = {key: hook.weights_map[key] for key in tensors}
            try:
                check_packed(tensors, layer.shape, layer.group_size, layer.bit_counts)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _empty_packed(layer: Any, config: SlimplusConfig, counts: Mapping[int, int]) -> PackedLinear | PackedEmbedding:
    """Return a packed layer of the same shape as `layer`, with `counts` groups of each width."""
    group_size, scale_bits = config.group_size, config.scale_bits
    if (scale := embedding_scale(layer)) is not None:
        rows, columns = layer.weight.shape
        return PackedEmbedding(rows, columns, group_size, counts, layer.weight.dtype, scale_bits, scale)
    if (shape := linear_shape(layer)) is None:
        raise ValueError(f"a {type(layer).__name__} cannot be packed, only a linear layer or an embedding")
    bias, dtype = layer.bias is not None, layer.weight.dtype
    return PackedLinear(shape[1], shape[0], group_size, counts, bias, dtype, scale_bits)


def register() -> None:
    """Register the method with transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SlimplusConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SlimplusQuantizer)


register()
