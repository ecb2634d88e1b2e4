"""Quantization of one transformer block without training: Hessians, bit widths, integers.

Every rank runs its share of the calibration windows. Each linear layer has an owner, the rank that inverts its Hessian
and quantizes it; the result goes to all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.blockwise.stacks import StackSums
from slimplus.format.affine import QuantizedWeight, group_count, uniform_bits
from slimplus.quantization.error_propagation import PairedAccumulator, compensated_weight
from slimplus.quantization.gptq import RoundedWeight
from slimplus.quantization.linear import QuantizationConfig, round_weight
from slimplus.quantization.salience import (
    HessianAccumulator,
    InverseHessian,
    group_salience,
    invert_hessian,
    shrunk_hessian,
)
from slimplus.quantization.salience_allocation import AllocationSearch, paired_bits


@dataclass(frozen=True)
class BlockResult:
    """A quantized block.

    Attributes:
        weights: layer → its quantized weight.
        remainders: layer → what rounding left of its weights, `[out, in]`, see `RoundedWeight`.
        divergence: layer → KL for 0, 1, 2, … pairs of groups, if SliM-LLM's search found the widths.
        percdamp: layer → damping that its Hessian needed, as a part of the mean of its diagonal.
        dead_columns: layer → number of its columns whose input is zero for every calibration token.
        tokens: expert's layer → number of calibration tokens that were sent to it, if Hessians were measured.
    """

    weights: dict[str, QuantizedWeight]
    remainders: dict[str, Tensor]
    divergence: dict[str, list[float]]
    percdamp: dict[str, float]
    dead_columns: dict[str, int]
    tokens: dict[str, int]


@dataclass(frozen=True)
class _Measured:
    """What this rank knows of the inputs of some layers of a block.

    Attributes:
        hessians: Hessians that this rank owns, `[in, in]`, by the first layer that reads the same input.
        inverses: their inverses.
        tokens: expert's layer → number of tokens that all ranks sent to it.
        cross: the cross products `C` of the same inputs, `[in, in]`, where the weights make up for earlier errors.
    """

    hessians: dict[str, Tensor]
    inverses: dict[str, InverseHessian]
    tokens: dict[str, int]
    cross: dict[str, Tensor] = field(default_factory=dict)


def quantize_block(
    data: BlockData, config: QuantizationConfig, bits: Mapping[str, Tensor] | None = None
) -> BlockResult:
    """Quantize every linear layer of a block, without training; all ranks get the same result.

    The Hessians of experts may not fit the memory together. They are then made for a chunk of the layers at a time, and
    again for the rounding if the search for widths needed all of them first.

    Args:
        data: the block and its inputs.
        config: method and constants.
        bits: layer → widths of its groups; None leaves the choice to `config.allocation`.

    Raises:
        ValueError: if a Hessian cannot be inverted.
    """
    divergence: dict[str, list[float]] = {}
    measured: _Measured | None = None
    if bits is None and config.allocation == "slimllm":
        salience: dict[str, Tensor] = {}
        for chunk in data.chunks:
            measured = None  # so that the last chunk's is freed first
            measured = _measure(data, chunk, config)
            own, found = _search(data, chunk, measured.inverses, config)
            salience, divergence = salience | own, divergence | found
        bits = _paired(data, salience, divergence, config)
    if bits is None:
        bits = {
            name: uniform_bits(layer.in_features, config.group_size, config.bits) for name, layer in data.layers.items()
        }
    parts: list[BlockResult] = []
    chunks = data.chunks
    if config.error_propagation:
        data, parts = _round_in_order(data, bits, config)
        measured, (_, *chunks) = None, chunks
    for chunk in chunks:
        if measured is None or len(data.chunks) > 1:
            measured = None
            measured = _measure(data, chunk, config)
        parts.append(_round(data, chunk, measured, bits, config))
    return _joined(parts, divergence)


def _round_in_order(
    data: BlockData, bits: Mapping[str, Tensor], config: QuantizationConfig
) -> tuple[BlockData, list[BlockResult]]:
    """Quantize the layers that are no expert's in the order in which the block runs them.

    Each is measured behind its quantized predecessors, and makes up for what they did to its inputs.

    Returns:
        The block with the quantized layers in place, and the results.
    """
    assert data.full_hidden is not None
    full = replace(data, hidden=data.full_hidden)
    data = replace(data, block=deepcopy(data.block))
    unpaired = set(data.chunks[0]).difference(*data.readers)
    parts = []
    for names in [*full.readers, *([name] for name in data.layers if name in unpaired)]:
        paired = names[0] not in unpaired
        measured = _measure_pairs(data, full, names[0], config) if paired else _measure(data, names, config)
        parts.append(_round(data, names, measured, bits, config))
        for name, weight in parts[-1].weights.items():
            data.layers[name].weight.data = weight.dequantize()
    return data, parts


def _joined(parts: Sequence[BlockResult], divergence: dict[str, list[float]]) -> BlockResult:
    """Return the results of the parts of a block as one."""
    first, *others = parts
    for other in others:
        for part in fields(first):
            getattr(first, part.name).update(getattr(other, part.name))
    return replace(first, divergence=divergence)


def _round(
    data: BlockData, names: Sequence[str], measured: _Measured, bits: Mapping[str, Tensor], config: QuantizationConfig
) -> BlockResult:
    """Return the result of some layers of a block, on every rank."""
    own = {}
    for name in names:
        if name in data.own_layers:
            leader = data.leader[name]
            weight, hessian, inverse = data.layers[name].weight, measured.hessians[leader], measured.inverses[leader]
            if leader in measured.cross:
                weight = compensated_weight(weight, measured.cross[leader], inverse, config.error_propagation)
            own[name] = round_weight(weight, bits[name], hessian, inverse, config)
    shared = {name: _broadcast_result(data, name, bits[name], own.get(name), config) for name in names}
    inverses = measured.inverses
    percdamp = _figure(data, names, {name: inverse.percdamp for name, inverse in inverses.items()})
    dead = _figure(data, names, {name: float(inverse.dead.sum()) for name, inverse in inverses.items()})
    return BlockResult(
        weights={name: weight for name, (weight, _) in shared.items()},
        remainders={name: remainder for name, (_, remainder) in shared.items()},
        divergence={},
        percdamp=percdamp,
        dead_columns={name: int(count) for name, count in dead.items()},
        tokens=measured.tokens,
    )


def _measure(data: BlockData, names: Sequence[str], config: QuantizationConfig) -> _Measured:
    """Run the block on all calibration windows, and return what this rank learns of the inputs of some layers."""
    leaders = list(dict.fromkeys(data.leader[name] for name in names))
    device = data.runner.device
    if config.method == "rtn":  # rounding to nearest does not depend on the inputs
        sizes = {name: data.layers[name].in_features for name in leaders if name in data.own_layers}
        hessians = {name: torch.eye(size, device=device) for name, size in sizes.items()}
        return _Measured(hessians, _invert(hessians, config), {})
    sums = StackSums(data, leaders, lambda layer: HessianAccumulator(layer.in_features, device))
    data.capture_inputs({name: accumulator.add for name, accumulator in sums.targets().items()})
    sums.merge(data.ranks, device)
    tokens = {name: accumulator.tokens for name, accumulator in sums.own.items() if name in data.stack}
    for shared in sums.shared.values():
        data.ranks.sum(shared.total)
    hessians = {}
    for name in leaders:
        accumulator = sums.own.pop(name)  # so that each is freed once its Hessian is made
        data.ranks.sum_on(data.owner[name], accumulator.total)
        if name in data.own_layers:
            stack = sums.shared_by(name)
            hessians[name] = accumulator.hessian if stack is None else shrunk_hessian(accumulator, stack)
    return _Measured(hessians, _invert(hessians, config), tokens)


def _measure_pairs(data: BlockData, full: BlockData, leader: str, config: QuantizationConfig) -> _Measured:
    """Return what this rank learns of the inputs of one layer, and of what they are in full precision."""
    device = data.runner.device
    sums = PairedAccumulator(data.layers[leader].in_features, device)
    data.capture_pairs(full, leader, sums.add_pair)
    sums.tokens = int(data.ranks.sum(torch.tensor(sums.tokens, dtype=torch.int64, device=device)))
    for total in (sums.total, sums.cross):
        data.ranks.sum_on(data.owner[leader], total)
    if leader not in data.own_layers:
        return _Measured({}, {}, {})
    hessians = {leader: sums.hessian}
    return _Measured(hessians, _invert(hessians, config), {}, {leader: sums.cross_product})


def _invert(hessians: Mapping[str, Tensor], config: QuantizationConfig) -> dict[str, InverseHessian]:
    """Return the inverses of Hessians, by the same names."""
    return {name: invert_hessian(hessian, config.percdamp) for name, hessian in hessians.items()}


def _search(
    data: BlockData, names: Sequence[str], inverses: Mapping[str, InverseHessian], config: QuantizationConfig
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Return the salience of the groups of some layers, and the KL of every candidate of SliM-LLM's search.

    Every rank tries the candidates of all the layers on its share of the windows.
    """
    size = config.group_size
    salience = {}
    for name in names:
        layer, inverse = data.layers[name], inverses.get(data.leader[name])
        if inverse is None:
            own = torch.empty(group_count(layer.in_features, size), device=data.runner.device)
        else:
            own = group_salience(layer.weight, inverse, size)
        salience[name] = data.ranks.send(data.owner[name], own)
    searches = {
        name: AllocationSearch(data.layers[name].weight, salience[name], config.bits, size, config.integer_zero_points)
        for name in names
    }
    windows = search_windows(data.ranks, data.hidden)
    data.capture_inputs({name: search.add for name, search in searches.items()}, windows)
    return salience, {name: data.ranks.sum(search.divergence).tolist() for name, search in searches.items()}


def _paired(
    data: BlockData, salience: Mapping[str, Tensor], divergence: Mapping[str, list[float]], config: QuantizationConfig
) -> dict[str, Tensor]:
    """Return the widths that SliM-LLM's search finds; the experts of a stack have as many pairs as each other."""
    totals: dict[str, Tensor] = {}
    for name, own in divergence.items():
        stack = data.stack.get(name, name)
        totals[stack] = totals.get(stack, 0) + torch.tensor(own, dtype=torch.float64)
    return {
        name: paired_bits(
            salience[name],
            int(totals[data.stack.get(name, name)].argmin()),
            config.bits,
            layer.in_features,
            config.group_size,
        )
        for name, layer in data.layers.items()
    }


def _broadcast_result(
    data: BlockData, name: str, bits: Tensor, own: RoundedWeight | None, config: QuantizationConfig
) -> tuple[QuantizedWeight, Tensor]:
    """Return, on every rank, the quantized weight and the remainder of a layer that its owner gives as `own`."""
    weight = data.layers[name].weight
    if own is None:
        grid = weight.new_empty(len(weight), len(bits))
        integers = torch.empty_like(weight, dtype=torch.uint8)
        empty = QuantizedWeight(
            integers, grid, grid.clone(), bits, config.group_size, config.scale_bits, config.integer_zero_points
        )
        own = RoundedWeight(empty, torch.empty_like(weight), grid)
    quantized = own.weight
    integers, scale, zero_point, remainder = (
        data.ranks.send(data.owner[name], tensor.contiguous())
        for tensor in (quantized.integers, quantized.scale, quantized.zero_point, own.remainder)
    )
    return replace(quantized, integers=integers, scale=scale, zero_point=zero_point), remainder


def _figure(data: BlockData, names: Sequence[str], own: Mapping[str, float]) -> dict[str, float]:
    """Return, on every rank, a figure of some layers' Hessians, given those of the Hessians that this rank owns."""
    figures = {}
    for name in names:
        value = torch.tensor(own.get(data.leader[name], 0.0), dtype=torch.float64, device=data.runner.device)
        figures[name] = float(data.ranks.send(data.owner[name], value))
    return figures
