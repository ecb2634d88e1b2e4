"""The swap of a block's linear layers: for layers with learnable quantizers, or for packed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

from torch import Tensor, nn

from slimplus.blockwise.calibrate import BlockResult
from slimplus.format.affine import QuantizedWeight
from slimplus.models.architectures import find_linears
from slimplus.nn import FakeQuantizedLinear, PackedLinear

MakeQuantizer = Callable[[QuantizedWeight, nn.Linear, Tensor], FakeQuantizedLinear]
"""`(quantized weight, full-precision layer, remainder [out, in]) -> layer`."""


def fake_quantized_block(block: nn.Module, result: BlockResult, make: MakeQuantizer) -> nn.Module:
    """Return a copy of a block whose linear layers have learnable quantizers; nothing else requires a gradient."""
    copy = deepcopy(block).requires_grad_(False)
    for name, layer in find_linears(copy).items():
        copy.set_submodule(name, make(result.weights[name], layer, result.remainders[name]))
    return copy


def packed_block(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> nn.Module:
    """Return a copy of a block whose linear layers are packed."""
    copy = deepcopy(block)
    for name, layer in find_linears(copy).items():
        copy.set_submodule(name, PackedLinear.from_quantized(weights[name], layer.bias))
    return copy


def trained_weights(block: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized weights that the trained quantizers of a block give, by layer."""
    return {
        name: module.quantized_weight()
        for name, module in block.named_modules()
        if isinstance(module, FakeQuantizedLinear)
    }


def packed_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a block's packed layers, biases included, by their names in the block."""
    return {
        f"{name}.{key}": tensor
        for name, layer in block.named_modules()
        if isinstance(layer, PackedLinear)
        for key, tensor in layer.state_dict().items()
    }


def layer_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one layer among those of `packed_tensors`, by their names in the layer."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def load_packed_block(block: nn.Module, tensors: Mapping[str, Tensor], group_size: int) -> nn.Module:
    """Return a copy of a block with packed layers made from the tensors of `packed_tensors`.

    Raises:
        ValueError: if the tensors of a layer are no packed weight; the message names the layer.
    """
    copy = deepcopy(block)
    for name, layer in find_linears(copy).items():
        own = layer_tensors(tensors, name)
        try:
            packed = PackedLinear.from_tensors(own, layer.in_features, layer.out_features, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        copy.set_submodule(name, packed)
    return copy
