"""Quantizing one transformer block: Hessians, bits, calibration, and the swap of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from slimplus.models.architectures import find_linears
from slimplus.models.streaming import BlockArguments, BlockRunner
from slimplus.nn import FakeQuantizedLinear, PackedLinear
from slimplus.quantization.affine import QuantizedWeight, group_count
from slimplus.quantization.allocation import AllocationSearch, paired_bits, uniform_bits
from slimplus.quantization.gptq import RoundedWeight
from slimplus.quantization.linear import QuantizationConfig, quantize_linear
from slimplus.quantization.salience import HessianAccumulator, InverseHessian, group_salience, invert_hessian
from slimplus.training.ranks import Ranks

SEARCH_TOKENS = 8192  # the allocation search ranks a handful of candidates: more tokens cost time and change nothing

InputHook = Callable[[Tensor], None]


@dataclass(frozen=True)
class BlockData:
    """A full-precision block and what it is calibrated on.

    Attributes:
        block: float32, on the device; left as it is.
        hidden: this rank's share of the block's inputs, `[windows, sequence_length, hidden]`; all shares are equal.
        arguments: the block's other arguments.
        runner: runs the block.
        ranks: those that quantize the block together.
    """

    block: nn.Module
    hidden: Tensor
    arguments: BlockArguments
    runner: BlockRunner
    ranks: Ranks = Ranks()

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers by name."""
        return find_linears(self.block)

    def watch(self, hooks: Mapping[str, InputHook], windows: int | None = None) -> None:
        """Run the block on the first `windows` (default: all), calling `hooks[name]` with each input of that layer."""
        handles = [
            self.layers[name].register_forward_pre_hook(lambda _, inputs, hook=hook: hook(inputs[0]))
            for name, hook in hooks.items()
        ]
        try:
            self.runner.run(self.block, self.hidden[:windows], self.arguments)
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def leader(self) -> dict[str, str]:
        """Layer → the first layer that reads the same tensor (q, k and v; gate and up): they share one Hessian."""
        seen: dict[str, Tensor] = {}
        leader: dict[str, str] = {}

        def note(name: str, inputs: Tensor) -> None:
            seen[name] = inputs  # kept alive, so that no address is used twice
            leader[name] = next(other for other, tensor in seen.items() if tensor is inputs)

        self.watch({name: partial(note, name) for name in self.layers}, windows=1)
        return leader

    @cached_property
    def owner(self) -> dict[str, int]:
        """Layer → the rank that inverts its Hessian and quantizes it; layers that share a Hessian share a rank."""
        costs = dict.fromkeys(self.leader.values(), 0)
        for name, layer in self.layers.items():  # error compensation takes out · in² operations, an inversion in³
            own = self.leader[name] == name
            costs[self.leader[name]] += (layer.out_features + own * layer.in_features) * layer.in_features**2
        owners = self.ranks.owners(costs)
        return {name: owners[leader] for name, leader in self.leader.items()}

    @property
    def own_layers(self) -> dict[str, nn.Linear]:
        """The layers that this rank quantizes."""
        return {name: layer for name, layer in self.layers.items() if self.owner[name] == self.ranks.rank}


@dataclass(frozen=True)
class BlockResult:
    """A quantized block.

    Attributes:
        weights: each linear layer, quantized.
        remainders: of each layer, see `RoundedWeight`.
        divergence: each layer's KL for 0, 1, 2, … pairs, where the bits were searched.
        percdamp: the damping each layer's Hessian needed.
    """

    weights: dict[str, QuantizedWeight]
    remainders: dict[str, Tensor]
    divergence: dict[str, list[float]]
    percdamp: dict[str, float]


def quantize_block(
    data: BlockData, config: QuantizationConfig, bits: Mapping[str, Tensor] | None = None
) -> BlockResult:
    """Quantize every linear layer of a block, without training; each rank does some, and all get the same result.

    Args:
        data: the block and its inputs.
        config: method and constants.
        bits: widths of each layer's groups, if they are not to be searched.
    """
    hessians = _hessians(data, config)
    inverses = {name: invert_hessian(hessian, config.percdamp) for name, hessian in hessians.items()}
    divergence: dict[str, list[float]] = {}
    if bits is None and config.allocation == "slimllm":
        bits, divergence = _search(data, inverses, config)
    if bits is None:
        bits = {
            name: uniform_bits(layer.in_features, config.group_size, config.bits) for name, layer in data.layers.items()
        }
    own = {}
    for name, layer in data.own_layers.items():
        leader = data.leader[name]
        own[name] = quantize_linear(layer.weight, bits[name], hessians[leader], inverses[leader], config)
    shared = {name: _hand_out(data, name, bits[name], own.get(name), config) for name in data.layers}
    weights = {name: weight for name, (weight, _) in shared.items()}
    remainders = {name: remainder for name, (_, remainder) in shared.items()}
    return BlockResult(weights, remainders, divergence, _percdamp(data, inverses))


def _hessians(data: BlockData, config: QuantizationConfig) -> dict[str, Tensor]:
    """By leader, those that this rank owns."""
    columns = {name: data.layers[name].in_features for name in data.leader.values()}
    if config.method == "rtn":  # rounding to nearest looks at no input
        return {
            name: torch.eye(columns[name], device=data.runner.device) for name in columns if name in data.own_layers
        }
    sums = {name: HessianAccumulator(count, data.runner.device) for name, count in columns.items()}
    data.watch({name: accumulator.add for name, accumulator in sums.items()})
    hessians = {}
    for name in columns:
        accumulator = sums.pop(name)  # freed one by one
        data.ranks.sum_on(data.owner[name], accumulator.total)
        accumulator.tokens *= data.ranks.count
        if name in data.own_layers:
            hessians[name] = accumulator.hessian
    return hessians


def search_windows(ranks: Ranks, held: Tensor) -> int:
    """How many of this rank's windows, `held` `[windows, sequence_length, …]`, a search for widths looks at."""
    return min(ranks.windows(max(SEARCH_TOKENS // held.shape[1], 1)), len(held))


def _search(
    data: BlockData, inverses: Mapping[str, InverseHessian], config: QuantizationConfig
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Every rank tries the candidates of all layers on its share of the search's windows."""
    size = config.group_size
    salience = {}
    for name, layer in data.layers.items():
        inverse = inverses.get(data.leader[name])
        own = torch.empty(group_count(layer.in_features, size), device=data.runner.device)
        own = own if inverse is None else group_salience(layer.weight, inverse, size)
        salience[name] = data.ranks.send(data.owner[name], own)
    searches = {
        name: AllocationSearch(layer.weight, salience[name], config.bits, size) for name, layer in data.layers.items()
    }
    windows = search_windows(data.ranks, data.hidden)
    data.watch({name: search.add for name, search in searches.items()}, windows)
    bits, divergence = {}, {}
    for name, search in searches.items():
        total = data.ranks.sum(search.divergence)
        divergence[name] = total.tolist()
        pairs = int(total.argmin())
        bits[name] = paired_bits(salience[name], pairs, config.bits, data.layers[name].in_features, size)
    return bits, divergence


def _hand_out(
    data: BlockData, name: str, bits: Tensor, own: RoundedWeight | None, config: QuantizationConfig
) -> tuple[QuantizedWeight, Tensor]:
    """What the owner of a layer made of it, on every rank."""
    weight = data.layers[name].weight
    if own is None:
        grid = weight.new_empty(len(weight), len(bits))
        integers = torch.empty_like(weight, dtype=torch.uint8)
        empty = QuantizedWeight(integers, grid, grid.clone(), bits, config.group_size, config.scale_bits)
        own = RoundedWeight(empty, torch.empty_like(weight), grid)
    quantized = own.weight
    integers, scale, zero_point, remainder = (
        data.ranks.send(data.owner[name], tensor.contiguous())
        for tensor in (quantized.integers, quantized.scale, quantized.zero_point, own.remainder)
    )
    return replace(quantized, integers=integers, scale=scale, zero_point=zero_point), remainder


def _percdamp(data: BlockData, inverses: Mapping[str, InverseHessian]) -> dict[str, float]:
    needed = {}
    for name, leader in data.leader.items():
        own = inverses[leader].percdamp if leader in inverses else 0.0
        sent = data.ranks.send(data.owner[name], torch.tensor(own, dtype=torch.float64, device=data.runner.device))
        needed[name] = float(sent)
    return needed


MakeQuantizer = Callable[[QuantizedWeight, Tensor | None, Tensor], FakeQuantizedLinear]
"""`(weight, bias, remainder) -> layer`."""


def fake_quantized_block(block: nn.Module, result: BlockResult, make: MakeQuantizer) -> nn.Module:
    """A copy of `block` whose linear layers carry learnable quantizers; nothing else in it requires a gradient."""
    copy = deepcopy(block).requires_grad_(False)
    for name, layer in find_linears(copy).items():
        copy.set_submodule(name, make(result.weights[name], layer.bias, result.remainders[name]))
    return copy


def packed_block(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> nn.Module:
    """A copy of `block` whose linear layers are packed."""
    copy = deepcopy(block)
    for name, layer in find_linears(copy).items():
        copy.set_submodule(name, PackedLinear.from_quantized(weights[name], layer.bias))
    return copy


def trained_weights(block: nn.Module) -> dict[str, QuantizedWeight]:
    """What the trained quantizers of `block` give, ready to pack."""
    return {
        name: module.quantized_weight()
        for name, module in block.named_modules()
        if isinstance(module, FakeQuantizedLinear)
    }


def packed_tensors(block: nn.Module) -> dict[str, Tensor]:
    """The tensors of the packed layers of `block`, biases included, by name."""
    return {
        f"{name}.{key}": tensor
        for name, layer in block.named_modules()
        if isinstance(layer, PackedLinear)
        for key, tensor in layer.state_dict().items()
    }


def layer_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of one layer among what `packed_tensors` gave, by their names in the layer."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def load_packed_block(block: nn.Module, tensors: Mapping[str, Tensor], group_size: int) -> nn.Module:
    """A copy of `block` with the packed layers that `packed_tensors` gave.

    Raises:
        ValueError: naming the layer whose tensors are no packed weight.
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
