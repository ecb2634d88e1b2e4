"""Sensitivity of groups to their width, measured backwards through one block at a time, and the widths it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.format.affine import group_count
from slimplus.models.precision import autocast
from slimplus.models.streaming import run_block
from slimplus.quantization.knapsack import allocate, costs_and_budget
from slimplus.quantization.linear import QuantizationConfig
from slimplus.quantization.sensitivity import GradientStatistics, group_sensitivity

OutputGradient = Callable[[int, Tensor], Tensor]
"""`(window, output of the block [1, sequence_length, hidden]) -> gradient of the loss`, the same shape."""


@contextmanager
def _recorded(layers: Mapping[str, nn.Linear], statistics: Mapping[str, GradientStatistics]) -> Iterator[None]:
    """Within this context every backward adds to the statistics of the layers."""

    def record(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        source = inputs[0].detach()
        output.register_hook(lambda gradient: statistics[name].add(source, gradient))

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_statistics(
    data: BlockData, windows: int, output_gradient: OutputGradient
) -> tuple[dict[str, GradientStatistics], Tensor]:
    """Statistics of every linear layer of a block over all ranks' windows, and the gradient of the block's input.

    Args:
        data: the block and its inputs.
        windows: how many of this rank's.
        output_gradient: of the loss, for one window's output.

    Returns:
        The statistics by layer, equal on all ranks, and `[windows, sequence_length, hidden]`, float32, on the CPU.
    """
    device = data.runner.device
    statistics = {
        name: GradientStatistics(layer.in_features, layer.out_features, device) for name, layer in data.layers.items()
    }
    gradients = torch.zeros(windows, *data.hidden.shape[1:])
    with _recorded(data.layers, statistics):
        for window in range(windows):
            hidden = data.hidden[window : window + 1].to(device, torch.float32).requires_grad_()
            with autocast(device, data.runner.precision):
                output = run_block(data.block, hidden, data.arguments)
            output.backward(output_gradient(window, output.detach()))
            assert hidden.grad is not None
            gradients[window] = hidden.grad[0]
    for held in statistics.values():
        data.ranks.sum(held.inputs.total)
        data.ranks.sum(held.rows)
    return statistics, gradients


def block_tables(
    data: BlockData, statistics: Mapping[str, GradientStatistics], widths: Sequence[int], config: QuantizationConfig
) -> dict[str, Tensor]:
    """Sensitivity `[widths, groups]` of each layer of a block; each rank measures some layers, all get the result."""
    tables = {}
    for number, (name, layer) in enumerate(data.layers.items()):
        table = torch.zeros(len(widths), group_count(layer.in_features, config.group_size), device=data.runner.device)
        if number % data.ranks.count == data.ranks.rank:
            table = group_sensitivity(layer.weight, statistics[name], widths, config.group_size, config.percdamp)
        tables[name] = data.ranks.sum(table)
    return tables


def allocate_block(data: BlockData, config: QuantizationConfig) -> dict[str, Tensor]:
    """Widths of a block's groups that keep its output's error, token by token over the token's energy, the smallest.

    The average over the block is `config.bits` exactly.
    """
    windows = search_windows(data.ranks, data.hidden)
    generator = torch.Generator()

    def probe(window: int, output: Tensor) -> Tensor:
        # A random direction: its squared product with an error has the error's squared magnitude as its mean.
        generator.manual_seed(window * data.ranks.count + data.ranks.rank)
        direction = torch.randn(output.shape, generator=generator).to(output.device)
        return (direction / output.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)).to(output.dtype)

    with torch.enable_grad():
        statistics, _ = backward_statistics(data, windows, probe)
    tables = block_tables(data, statistics, config.widths, config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in data.layers.items()}
    costs, budget = costs_and_budget(shapes, config.bits, config.group_size, config.widths)
    return allocate(tables, costs, config.widths, budget, exact=True).bits
