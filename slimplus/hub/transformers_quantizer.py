"""The `slimplus` quantization method of transformers, by which `from_pretrained` builds packed layers.

This module is imported while `transformers` itself is being imported (see `slimplus/__init__.py`). Of transformers it
may import only what `transformers.quantizers` imports as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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
from slimplus.models.exact import not_finite
from slimplus.nn import PackedEmbedding, PackedLinear, TiedHead, prepare_inference
from slimplus.nn.dequantize import replace_packed_layers
from slimplus.nn.expert_stack import ExpertStack, expert_layout
from slimplus.nn.packed_linear import offloading_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = TypeVar("Value")

EMPTY_PARAMETER = "packed_dtype_and_device"
"""Name of the parameter without elements of a model that has no other."""


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
        stored = read_headers(checkpoint_files or [])
        check_packed_tensors(stored, config.group_size, config.modules, config.shapes, config.scale_bits)
        whole = type(model).__name__ in (model.config.architectures or [type(model).__name__])
        if not whole:  # such as AutoModel and AutoModelForSequenceClassification build
            config.modules = names_in_part(model, config.modules)
            config.shapes = names_in_part(model, config.shapes)
            stored = names_in_part(model, stored)
        swap_packed_layers(model, config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_buffers({name: buffer for name, buffer in model.named_buffers() if name not in shapes})
        if not whole:  # transformers warns that a head of its own is newly initialized
            inside = "" if _is_base(model) else f"{model.base_model_prefix}."
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(inside)}
        check_other_tensors(stored, shapes, model.all_tied_weights_keys)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_packed_layers(model)
        if found := not_finite(model.state_dict().items()):
            raise ValueError(f"{found}; export or download the checkpoint again")
        prepare_inference(model)
        keep_a_parameter(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return True: packed tensors are saved as ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: packed layers pass gradients on to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile the decoding: packed products are operators that `torch.compile` knows."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace the packed layers of `model` by ordinary ones; `PreTrainedModel.dequantize` calls this."""
        replace_packed_layers(model, dtype or model.dtype)
        model._parameters.pop(EMPTY_PARAMETER, None)
        for name in ("_tied_weights_keys", "resize_token_embeddings"):  # back to those of the class
            model.__dict__.pop(name, None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model


def keep_a_parameter(model: PreTrainedModel) -> None:
    """Give an empty parameter to a model of which everything is packed, as in OLMo, whose norms have no weights.

    transformers takes the model's dtype and device from its first parameter. This one is not saved.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding) and not any(each.is_floating_point() for each in model.parameters()):
        empty = torch.empty(0, dtype=embedding.dtype, device=embedding.scales.device)
        model.register_parameter(EMPTY_PARAMETER, nn.Parameter(empty, requires_grad=False))
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), EMPTY_PARAMETER}


def _is_base(model: PreTrainedModel) -> bool:
    """Return whether `model` is a base model, such as AutoModel builds, and no head stands around it."""
    return not hasattr(model, model.base_model_prefix)


def names_in_part(model: PreTrainedModel, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return `values` by their names in a model that is only a part of the one that was quantized.

    A base model has the names without its prefix. What lies outside the base model, as the head does, is left out.

    Args:
        model: a base model, or one with another head.
        values: values by name of a layer or a tensor in the whole model.
    """
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in values):  # saved from a base model
        return dict(values)
    dropped = prefix if _is_base(model) else ""
    return {name.removeprefix(dropped): value for name, value in values.items() if name.startswith(prefix)}


def swap_packed_layers(model: PreTrainedModel, config: SlimplusConfig) -> None:
    """Replace the linear layers and embeddings that `config` names by packed ones without data, on the meta device.

    Raises:
        ValueError: naming the layer, if the model has no such layer, or the layer has another shape.
    """
    _take_up_experts(model, config.modules)
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
    if not isinstance(embedding, PackedEmbedding):
        return
    model.resize_token_embeddings = _refuse_resizing  # type: ignore[method-assign,assignment]
    head = model.get_output_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None:
        model.set_output_embeddings(TiedHead(embedding, head.bias))
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}  # transformers can tie only ordinary weights


def _take_up_experts(model: nn.Module, names: Collection[str]) -> None:
    """Replace modules of experts, of which `names` holds the packed layers, by linear layers for each expert.

    Raises:
        ValueError: if some experts of a module are packed and others are not.
    """
    named = {name.rpartition(".")[0] for name in names}
    for name, module in list(model.named_modules()):
        layout = expert_layout(module)
        if layout is None or named.isdisjoint(f"{name}.{projection}" for projection in layout.projections):
            continue
        count = len(module.get_parameter(layout.up))
        expected = (f"{name}.{projection}.{expert}" for projection in layout.projections for expert in range(count))
        if missing := next((layer for layer in expected if layer not in names), None):
            raise ValueError(f"quantization_config.modules lacks {missing}, one of {count} experts")
        model.set_submodule(name, ExpertStack(module))


def _refuse_resizing(*_: Any, **__: Any) -> None:
    """Take the place of a model's `resize_token_embeddings` where the embedding is packed."""
    raise ValueError(
        "a packed embedding cannot be resized; slimplus.dequantize(model) makes an ordinary one, or quantize the model "
        "with quantization.embedding_bits=null"
    )


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
