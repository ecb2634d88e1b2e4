"""The `slimplus` quantization method of vLLM, by which vLLM serves packed checkpoints.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. The interfaces are
those of vLLM 0.33: https://docs.vllm.ai/en/stable/design/plugin_system/ and `register_quantization_config`.

vLLM multiplies q, k and v in one layer, and gate and up in another, while each packed layer has its own widths and its
own order of groups. The packed tensors of these layers are therefore loaded end to end into one flat parameter, and
become packed layers when all of them are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.hub.checks import check_quantization
from slimplus.hub.contents import METHOD
from slimplus.nn import PackedLinear
from slimplus.nn.fusion import FusedLinears

SHARD_IDS = {"q": 0, "k": 1, "v": 2}
"""Positions in vLLM's fused attention input by vLLM's shard ids; elsewhere a shard id is the position itself."""


class PackedConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's `quantization_config`.

    Args:
        group_size: columns a group.
        modules: number of groups of each width, by the name of each packed layer.
        scale_bits: bits that a scale takes, 8 or 16.
    """

    def __init__(self, group_size: int, modules: Mapping[str, BitCounts], scale_bits: int = 16) -> None:
        super().__init__()
        self.group_size, self.modules, self.scale_bits = group_size, dict(modules), scale_bits

    def get_name(self) -> Any:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that the kernels multiply."""
        return [torch.bfloat16, torch.float16]

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
            ValueError: naming the key that is missing or wrong.
        """
        check_quantization(config)
        modules = {
            name: {int(width): int(count) for width, count in counts.items()}
            for name, counts in config["modules"].items()
        }
        return cls(int(config["group_size"]), modules, int(config.get("scale_bits", 16)))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the packed layers for a model of vLLM that names its layers otherwise than transformers does."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method for the layer called `prefix`, or None for a layer that is not linear.

        Raises:
            ValueError: naming the layer, if it is packed and vLLM cannot use it so.
        """
        if not isinstance(layer, LinearBase):
            if prefix in self.modules:
                raise ValueError(
                    f"{prefix}: vLLM takes no packed embedding or head; quantize with "
                    "quantization.embedding_bits=null quantization.head_bits=null"
                )
            if any(name.startswith(f"{prefix}.") and name.rpartition(".")[2].isdigit() for name in self.modules):
                raise ValueError(
                    f"{prefix}: vLLM takes no packed experts; serve what `slimplus export --to dense` writes"
                )
            return None
        names = self._layer_names(prefix)
        packed = [name for name in names if name in self.modules]
        if not packed:
            return UnquantizedLinearMethod()
        if packed != names:
            raise ValueError(
                f"{prefix}: of {', '.join(names)} only {', '.join(packed)} is packed, but vLLM multiplies them in one "
                "layer; quantize all of them or none"
            )
        counts = [self.modules[name] for name in names]
        return PackedLinearMethod(prefix, names, counts, self.group_size, self.scale_bits)

    def _layer_names(self, prefix: str) -> list[str]:
        """Return the names of the checkpoint's layers that vLLM's layer `prefix` holds."""
        parent, dot, own = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(own, [own])]


@dataclass(frozen=True)
class Part:
    """The place of one layer's tensor in a flat parameter.

    Attributes:
        start: position of the first element.
        shape: shape of the tensor.
    """

    start: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """Return a view of the layer's tensor in `flat`."""
        return flat[self.start : self.start + prod(self.shape)].view(self.shape)


class PackedLinearMethod(LinearMethodBase):
    """The way vLLM creates, loads and applies one of its layers, which holds one or more packed layers.

    Args:
        prefix: vLLM's name of the layer.
        names: names of the checkpoint's layers in it, in vLLM's order.
        bit_counts: number of groups of each width in each of these layers.
        group_size: columns a group.
        scale_bits: bits that a scale takes, 8 or 16.
    """

    def __init__(
        self, prefix: str, names: Sequence[str], bit_counts: Sequence[BitCounts], group_size: int, scale_bits: int
    ) -> None:
        self.prefix, self.names, self.bit_counts = prefix, names, bit_counts
        self.group_size, self.scale_bits = group_size, scale_bits
        self._parts: dict[str, dict[int, Part]] = {}
        self._features: tuple[int, list[int]] = (0, [])
        self._dtype = torch.bfloat16

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give `layer` a flat parameter for each tensor of the packed format.

        Args:
            layer: vLLM's layer.
            input_size_per_partition: columns of the weight on this device.
            output_partition_sizes: rows of each packed layer on this device.
            input_size: columns of the weight.
            output_size: rows of all the packed layers.
            params_dtype: dtype of the activations.
            **_: further arguments of vLLM, which have no meaning here.

        Raises:
            ValueError: under tensor parallelism.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(
                f"{self.prefix}: packed layers are not split over devices; serve with --tensor-parallel-size 1 "
                "(--data-parallel-size and --pipeline-parallel-size use several)"
            )
        self._features, self._dtype = (input_size, list(output_partition_sizes)), params_dtype
        sizes: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        for position, (rows, counts) in enumerate(zip(output_partition_sizes, self.bit_counts, strict=True)):
            for name, (shape, dtype) in packed_shapes(rows, counts, self.group_size, self.scale_bits).items():
                start = sizes.get(name, 0)
                self._parts.setdefault(name, {})[position] = Part(start, shape)
                sizes[name], dtypes[name] = start + prod(shape), dtype
        for name, size in sizes.items():
            parameter = nn.Parameter(torch.empty(size, dtype=dtypes[name]), requires_grad=False)
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined] # vLLM's convention
            layer.register_parameter(name, parameter)
        get_current_vllm_config().compilation_config.static_forward_context[self.prefix] = layer

    def _loader(self, name: str) -> Any:
        """Return the function that vLLM calls with each tensor of the checkpoint for the parameter `name`."""

        def load(parameter: Tensor, loaded: Tensor, shard_id: int | str | None = None) -> None:
            position = SHARD_IDS[shard_id] if isinstance(shard_id, str) else shard_id or 0
            part = self._parts[name].get(position)
            if part is None or part.shape != tuple(loaded.shape):
                raise ValueError(
                    f"{self.names[position]}.{name}: config.json asks for {part and part.shape}, but the checkpoint "
                    f"holds {tuple(loaded.shape)}; export or download it again"
                )
            part.view(parameter.data).copy_(loaded)

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the flat parameters by packed layers."""
        in_features, out_features = self._features
        flat = {name: layer.get_parameter(name).data for name in self._parts}
        layers = []
        for position, rows in enumerate(out_features):
            # Copies, since the kernels need aligned tensors; the flat parameters are freed below.
            own = {
                name: parts[position].view(flat[name]).clone()
                for name, parts in self._parts.items()
                if position in parts
            }
            layers.append(PackedLinear.from_tensors(own, in_features, rows, self.group_size))
        for name in self._parts:
            delattr(layer, name)
        layer.packed = PackedLinears(layers, self._dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply `x` `[..., in]` by the packed layers, `[..., sum of out]`."""
        _, out_features = self._features
        outputs = vllm_linear(x, self.prefix, sum(out_features))
        return outputs if bias is None else outputs + bias


class PackedLinears(nn.Module):
    """Packed layers that read the same input, with their outputs side by side.

    Args:
        layers: packed layers without biases, on the device where they are used.
        dtype: dtype of the inputs.
    """

    def __init__(self, layers: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._fused = FusedLinears(layers)
        if self._fused.supports(dtype, rows=1):
            self._fused.warm_up(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by all the layers, `[..., sum of out]`."""
        if self._fused.supports(inputs.dtype, inputs.numel() // inputs.shape[-1]):
            return self._fused.linear(inputs)
        return torch.cat([layer(inputs) for layer in self.layers], dim=-1)


@torch.library.custom_op("slimplus::vllm_linear", mutates_args=())
def vllm_linear(inputs: Tensor, prefix: str, out_features: int) -> Tensor:
    """Multiply `inputs` `[..., in]` by the packed layers in vLLM's layer `prefix`, `[..., out_features]`.

    It is one operator because vLLM's compiler must not see that few rows are multiplied otherwise than many.
    """
    layer = get_forward_context().no_compile_layers[prefix]
    outputs: Tensor = layer.packed(inputs)
    return outputs


@vllm_linear.register_fake
def _(inputs: Tensor, prefix: str, out_features: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def register() -> None:
    """Register the method with vLLM; a second call does nothing."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(PackedConfig)
