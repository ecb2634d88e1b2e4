"""Quantizing one transformer block: Hessians, bits, calibration, and the swap of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from slimplus.models.architectures import find_linears
from slimplus.models.streaming import BlockArguments, BlockRunner
from slimplus.nn import FakeQuantizedLinear, PackedLinear
from slimplus.quantization.affine import QuantizedWeight
from slimplus.quantization.allocation import AllocationSearch, paired_bits, uniform_bits
from slimplus.quantization.linear import QuantizationConfig, quantize_linear
from slimplus.quantization.salience import HessianAccumulator, InverseHessian, group_salience, invert_hessian

SEARCH_TOKENS = 8192  # the allocation search ranks a handful of candidates: more tokens cost time and change nothing

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks."""

InputHook = Callable[[Tensor], None]


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], hooks: Mapping[str, InputHook]) -> Iterator[None]:
    """While open, call `hooks[name]` with the input of `layers[name]` at each of its forwards."""
    handles = [
        layers[name].register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class SharedInputs:
    """Which linear layers of a block read the same tensor (q, k and v; gate and up): they share one Hessian.

    Attributes:
        leader: layer → the first layer that reads the same input.
    """

    leader: dict[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def find(cls, block: nn.Module, hidden: Tensor, arguments: BlockArguments, runner: BlockRunner) -> SharedInputs:
        """Run one window and compare the inputs' identity."""
        layers, seen, shared = find_linears(block), {}, cls()

        def note(name: str, inputs: Tensor) -> None:
            seen[name] = inputs  # kept alive, so that no address is used twice
            shared.leader[name] = next(other for other, tensor in seen.items() if tensor is inputs)

        with watch_inputs(layers, {name: partial(note, name) for name in layers}):
            runner.run(block, hidden[:1], arguments)
        return shared

    @property
    def leaders(self) -> set[str]:
        return set(self.leader.values())


@dataclass(frozen=True)
class BlockResult:
    """A quantized block.

    Attributes:
        weights: each linear layer, quantized.
        divergence: each layer's KL for 0, 1, 2, … pairs, where the bits were searched.
        percdamp: the damping each layer's Hessian needed.
    """

    weights: dict[str, QuantizedWeight]
    divergence: dict[str, list[float]]
    percdamp: dict[str, float]


def quantize_block(
    block: nn.Module,
    hidden: Tensor,
    arguments: BlockArguments,
    config: QuantizationConfig,
    runner: BlockRunner,
    reduce: Reduce,
    bits: Mapping[str, Tensor] | None = None,
) -> BlockResult:
    """Quantize every linear layer of `block` (float32, on the device; left as it is) without training.

    Args:
        block: the full-precision block.
        hidden: this rank's share of the block's inputs, `[windows, sequence_length, hidden]`.
        arguments: the block's other arguments.
        config: method and constants.
        runner: runs the block.
        reduce: sums a tensor over ranks.
        bits: widths of each layer's groups, if they are not to be searched.
    """
    layers = find_linears(block)
    shared = SharedInputs.find(block, hidden, arguments, runner)
    hessians = _hessians(block, shared, hidden, arguments, config, runner, reduce)
    inverses = {name: invert_hessian(hessian, config.percdamp) for name, hessian in hessians.items()}
    divergence: dict[str, list[float]] = {}
    if bits is None and config.mixes_bits:
        bits, divergence = _search(block, shared, inverses, hidden, arguments, config, runner, reduce)
    weights = {}
    for name, layer in layers.items():
        leader = shared.leader[name]
        layer_bits = uniform_bits(layer.in_features, config.group_size, config.bits) if bits is None else bits[name]
        weights[name] = quantize_linear(layer.weight, layer_bits, hessians[leader], inverses[leader], config)
    return BlockResult(weights, divergence, {name: inverses[shared.leader[name]].percdamp for name in layers})


def _hessians(
    block: nn.Module,
    shared: SharedInputs,
    hidden: Tensor,
    arguments: BlockArguments,
    config: QuantizationConfig,
    runner: BlockRunner,
    reduce: Reduce,
) -> dict[str, Tensor]:
    layers = find_linears(block)
    if config.method == "rtn":  # rounding to nearest looks at no input
        return {name: torch.eye(layers[name].in_features, device=runner.device) for name in shared.leaders}
    sums = {name: HessianAccumulator(layers[name].in_features, runner.device) for name in shared.leaders}
    with watch_inputs(layers, {name: accumulator.add for name, accumulator in sums.items()}):
        runner.run(block, hidden, arguments)
    return {
        name: reduce(accumulator.hessian) / reduce(torch.ones((), device=runner.device))
        for name, accumulator in sums.items()
    }


def _search(
    block: nn.Module,
    shared: SharedInputs,
    inverses: Mapping[str, InverseHessian],
    hidden: Tensor,
    arguments: BlockArguments,
    config: QuantizationConfig,
    runner: BlockRunner,
    reduce: Reduce,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    layers = find_linears(block)
    salience = {
        name: group_salience(layer.weight, inverses[shared.leader[name]], config.group_size)
        for name, layer in layers.items()
    }
    searches = {
        name: AllocationSearch(layer.weight, salience[name], config.bits, config.group_size)
        for name, layer in layers.items()
    }
    windows = max(SEARCH_TOKENS // hidden.shape[1], 1)
    with watch_inputs(layers, {name: search.add for name, search in searches.items()}):
        runner.run(block, hidden[:windows], arguments)
    bits, divergence = {}, {}
    for name, search in searches.items():
        total = reduce(search.divergence)
        divergence[name] = total.tolist()
        bits[name] = paired_bits(
            salience[name], int(total.argmin()), config.bits, layers[name].in_features, config.group_size
        )
    return bits, divergence


def fake_quantized_block(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> nn.Module:
    """A copy of `block` whose linear layers carry learnable quantizers; nothing else in it requires a gradient."""
    copy = deepcopy(block).requires_grad_(False)
    for name, layer in find_linears(copy).items():
        copy.set_submodule(name, FakeQuantizedLinear(weights[name], layer.bias))
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


def load_packed_block(block: nn.Module, tensors: Mapping[str, Tensor], group_size: int) -> nn.Module:
    """A copy of `block` with the packed layers that `packed_tensors` gave."""
    copy = deepcopy(block)
    for name, layer in find_linears(copy).items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        copy.set_submodule(name, PackedLinear.from_tensors(own, layer.in_features, layer.out_features, group_size))
    return copy
