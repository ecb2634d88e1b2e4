"""Quantization of one transformer block without training: Hessians, bit widths, integers.

Every rank runs its share of the calibration windows. Each linear layer has an owner, the rank that inverts its Hessian
and quantizes it; the result goes to all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.format.affine import QuantizedWeight, group_count, uniform_bits
from slimplus.quantization.gptq import RoundedWeight
from slimplus.quantization.linear import QuantizationConfig, round_weight
from slimplus.quantization.salience import HessianAccumulator, InverseHessian, group_salience, invert_hessian
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
    """

    weights: dict[str, QuantizedWeight]
    remainders: dict[str, Tensor]
    divergence: dict[str, list[float]]
    percdamp: dict[str, float]
    dead_columns: dict[str, int]


def quantize_block(
    data: BlockData, config: QuantizationConfig, bits: Mapping[str, Tensor] | None = None
) -> BlockResult:
    """Quantize every linear layer of a block, without training; all ranks get the same result.

    Args:
        data: the block and its inputs.
        config: method and constants.
        bits: layer → widths of its groups; None leaves the choice to `config.allocation`.

    Raises:
        ValueError: if a Hessian cannot be inverted.
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
        own[name] = round_weight(layer.weight, bits[name], hessians[leader], inverses[leader], config)
    shared = {name: _broadcast_result(data, name, bits[name], own.get(name), config) for name in data.layers}
    weights = {name: weight for name, (weight, _) in shared.items()}
    remainders = {name: remainder for name, (_, remainder) in shared.items()}
    percdamp = _figure(data, {name: inverse.percdamp for name, inverse in inverses.items()})
    dead = _figure(data, {name: float(inverse.dead.sum()) for name, inverse in inverses.items()})
    return BlockResult(weights, remainders, divergence, percdamp, {name: int(count) for name, count in dead.items()})


def _hessians(data: BlockData, config: QuantizationConfig) -> dict[str, Tensor]:
    """Return the Hessians that this rank owns, `[in, in]`, by the first layer that reads the same input."""
    columns = {name: data.layers[name].in_features for name in data.leader.values()}
    if config.method == "rtn":  # rounding to nearest does not depend on the inputs
        return {
            name: torch.eye(columns[name], device=data.runner.device) for name in columns if name in data.own_layers
        }
    sums = {name: HessianAccumulator(count, data.runner.device) for name, count in columns.items()}
    data.capture_inputs({name: accumulator.add for name, accumulator in sums.items()})
    hessians = {}
    for name in columns:
        accumulator = sums.pop(name)  # so that each is freed once its Hessian is made
        data.ranks.sum_on(data.owner[name], accumulator.total)
        accumulator.tokens *= data.ranks.count
        if name in data.own_layers:
            hessians[name] = accumulator.hessian
    return hessians


def _search(
    data: BlockData, inverses: Mapping[str, InverseHessian], config: QuantizationConfig
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Return the widths that SliM-LLM's search finds for each layer, and the KL of every candidate.

    Every rank tries the candidates of all layers on its share of the windows.
    """
    size = config.group_size
    salience = {}
    for name, layer in data.layers.items():
        inverse = inverses.get(data.leader[name])
        if inverse is None:
            own = torch.empty(group_count(layer.in_features, size), device=data.runner.device)
        else:
            own = group_salience(layer.weight, inverse, size)
        salience[name] = data.ranks.send(data.owner[name], own)
    searches = {
        name: AllocationSearch(layer.weight, salience[name], config.bits, size) for name, layer in data.layers.items()
    }
    windows = search_windows(data.ranks, data.hidden)
    data.capture_inputs({name: search.add for name, search in searches.items()}, windows)
    bits, divergence = {}, {}
    for name, search in searches.items():
        total = data.ranks.sum(search.divergence)
        divergence[name] = total.tolist()
        pairs = int(total.argmin())
        bits[name] = paired_bits(salience[name], pairs, config.bits, data.layers[name].in_features, size)
    return bits, divergence


def _broadcast_result(
    data: BlockData, name: str, bits: Tensor, own: RoundedWeight | None, config: QuantizationConfig
) -> tuple[QuantizedWeight, Tensor]:
    """Return, on every rank, the quantized weight and the remainder of a layer that its owner gives as `own`."""
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


def _figure(data: BlockData, own: Mapping[str, float]) -> dict[str, float]:
    """Return, on every rank, a figure of each layer's Hessian, given those of the Hessians that this rank owns."""
    figures = {}
    for name, leader in data.leader.items():
        value = torch.tensor(own.get(leader, 0.0), dtype=torch.float64, device=data.runner.device)
        figures[name] = float(data.ranks.send(data.owner[name], value))
    return figures
