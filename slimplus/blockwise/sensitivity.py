"""Sensitivity of groups to their width, measured by a backward pass through one block, and the widths it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.format.affine import group_count
from slimplus.models.block_arguments import run_block
from slimplus.models.precision import autocast
from slimplus.quantization.knapsack import allocate, costs_and_budget
from slimplus.quantization.linear import QuantizationConfig
from slimplus.quantization.sensitivity import GradientStatistics, group_sensitivity

OutputGradient = Callable[[int, Tensor], Tensor]
"""`(window, output of the block [1, sequence_length, hidden]) -> gradient of the loss` of the same shape."""


@contextmanager
def _recorded(layers: Mapping[str, nn.Linear], statistics: Mapping[str, GradientStatistics]) -> Iterator[None]:
    """Add every backward pass within this context to the statistics of the layers."""

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
    """Return statistics of every linear layer of a block over all ranks' windows, and the gradient of its input.

    Args:
        data: the block and its inputs.
        windows: how many of this rank's windows to run, the first ones.
        output_gradient: the gradient of the loss with respect to one window's output.

    Returns:
        The statistics by layer, equal on all ranks; and the gradient of the block's input on this rank's windows,
        `[windows, sequence_length, hidden]`, float32, on the CPU.
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
                output = run_block(data.block, hidden, data.arguments, [window])
            output.backward(output_gradient(window, output.detach()))
            assert hidden.grad is not None
            gradients[window] = hidden.grad[0]
    for layer_statistics in statistics.values():
        data.ranks.sum(layer_statistics.inputs.total)
        data.ranks.sum(layer_statistics.rows)
    return statistics, gradients


def block_tables(
    data: BlockData, statistics: Mapping[str, GradientStatistics], widths: Sequence[int], config: QuantizationConfig
) -> dict[str, Tensor]:
    """Return the sensitivity `[widths, groups]` of each layer of a block, on every rank.

    Each rank measures some of the layers.

    Args:
        data: the block and its inputs.
        statistics: layer → statistics of its backward pass.
        widths: bit widths to measure.
        config: group size and damping.
    """
    tables = {}
    for number, (name, layer) in enumerate(data.layers.items()):
        table = torch.zeros(len(widths), group_count(layer.in_features, config.group_size), device=data.runner.device)
        if number % data.ranks.count == data.ranks.rank:
            table = group_sensitivity(layer.weight, statistics[name], widths, config.group_size, config.percdamp)
        tables[name] = data.ranks.sum(table)
    return tables


def allocate_block(data: BlockData, config: QuantizationConfig) -> dict[str, Tensor]:
    """Return the widths of a block's groups that make the error of its output smallest.

    The error of each token counts in relation to the token's energy. The average width of the block is exactly
    `config.bits`.

    Raises:
        ValueError: if a sensitivity is not finite, or no widths meet the average.
    """
    windows = search_windows(data.ranks, data.hidden)
    generator = torch.Generator()

    def probe(window: int, output: Tensor) -> Tensor:
        # The squared product of an error with a random direction is, on average, the error's squared magnitude.
        generator.manual_seed(window * data.ranks.count + data.ranks.rank)
        direction = torch.randn(output.shape, generator=generator).to(output.device)
        return (direction / output.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)).to(output.dtype)

    with torch.enable_grad():
        statistics, _ = backward_statistics(data, windows, probe)
    tables = block_tables(data, statistics, config.widths, config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in data.layers.items()}
    costs, budget = costs_and_budget(shapes, config.bits, config.group_size, config.widths)
    return allocate(tables, costs, config.widths, budget, exact=True).bits
