"""Sensitivity of groups to their width, measured by a backward pass through one block, and the widths it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.blockwise.stacks import StackSums
from slimplus.format.affine import group_count
from slimplus.models.block_arguments import run_block
from slimplus.models.precision import autocast
from slimplus.quantization.knapsack import costs_and_budget
from slimplus.quantization.linear import QuantizationConfig
from slimplus.quantization.sensitivity import GradientStatistics, group_sensitivity
from slimplus.quantization.stack_allocation import allocate_stacks

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


def block_sensitivity(
    data: BlockData, windows: int, output_gradient: OutputGradient, config: QuantizationConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the sensitivity `[widths, groups]` of each layer of a block, and the gradient of the block's input.

    Args:
        data: the block and its inputs.
        windows: how many of this rank's windows to run, the first ones.
        output_gradient: the gradient of the loss with respect to one window's output.
        config: widths to measure, group size and damping.

    Returns:
        The tables, equal on all ranks; and the gradient on this rank's windows, `[windows, sequence_length, hidden]`,
        float32, on the CPU.
    """
    tables: dict[str, Tensor] = {}
    for chunk in data.chunks:
        sums, gradients = _backward_sums(data, chunk, windows, output_gradient)
        tables |= _tables(data, sums, config)
    return {name: tables[name] for name in data.layers}, gradients


def _backward_sums(
    data: BlockData, names: Sequence[str], windows: int, output_gradient: OutputGradient
) -> tuple[StackSums[GradientStatistics], Tensor]:
    """Return statistics of some layers over all ranks' windows, and the gradient of the block's input."""
    device = data.runner.device
    sums = StackSums(data, names, lambda layer: GradientStatistics(layer.in_features, layer.out_features, device))
    targets = sums.targets()
    gradients = torch.zeros(windows, *data.hidden.shape[1:])
    with _recorded({name: data.layers[name] for name in targets}, targets):
        for window in range(windows):
            hidden = data.hidden[window : window + 1].to(device, torch.float32).requires_grad_()
            with autocast(device, data.runner.precision):
                output = run_block(data.block, hidden, data.arguments, [window])
            output.backward(output_gradient(window, output.detach()))
            assert hidden.grad is not None
            gradients[window] = hidden.grad[0]
    sums.merge(data.ranks, device)
    for statistics in (*sums.own.values(), *sums.shared.values()):
        data.ranks.sum(statistics.inputs.total)
        data.ranks.sum(statistics.rows)
    return sums, gradients


def _tables(data: BlockData, sums: StackSums[GradientStatistics], config: QuantizationConfig) -> dict[str, Tensor]:
    """Return the sensitivity `[widths, groups]` of the layers that have sums; each rank measures some of them."""
    tables, size = {}, config.group_size
    for number, (name, statistics) in enumerate(sums.own.items()):
        layer, shared = data.layers[name], sums.shared_by(name)
        table = torch.zeros(len(config.widths), group_count(layer.in_features, size), device=data.runner.device)
        if number % data.ranks.count == data.ranks.rank:
            shrunk = statistics if shared is None else statistics.shrunk(shared)
            table = group_sensitivity(
                layer.weight, shrunk, config.widths, size, config.percdamp, config.integer_zero_points
            )
        tables[name] = data.ranks.sum(table)
    return tables


def allocate_block(data: BlockData, config: QuantizationConfig) -> dict[str, Tensor]:
    """Return the widths of a block's groups that make the error of its output smallest.

    The error of each token counts in relation to the token's energy. The average width of the block is exactly
    `config.bits`, or with `config.per_layer` at most that. The experts of a stack have equal numbers of groups of each
    width.

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
        tables, _ = block_sensitivity(data, windows, probe, config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in data.layers.items()}
    costs, budget = costs_and_budget(shapes, config.bits, config.group_size, config.widths)
    return allocate_stacks(
        tables, costs, config.widths, budget, exact=True, stack=data.stack, per_layer=config.per_layer
    ).bits
