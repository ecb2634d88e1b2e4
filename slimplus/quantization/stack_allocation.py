"""Widths for the groups of experts: the layers of a stack keep equal numbers of groups of each width.

The groups of each layer are ranked by what widening them saves. The groups of one rank, one of each layer of the stack,
get one width together; so the positions of the widths differ between experts, and their numbers do not. A knapsack over
the ranks of stacks and the groups of all other layers finds the widths, see `slimplus.quantization.knapsack`. Formats
whose layers have one width each need a width for each stack, and for each other layer, instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from slimplus.quantization.knapsack import Allocation, allocate


def allocate_stacks(
    losses: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    widths: Sequence[int],
    budget: int,
    exact: bool,
    stack: Mapping[str, str],
    per_layer: bool = False,
) -> Allocation:
    """Find widths with a small sum of losses whose costs meet a budget, with equal numbers of each in a stack.

    Args:
        losses: loss of each group at each width, `[widths, groups]`, by the layer's name.
        costs: cost of each group at each width, `[widths, groups]`, int64, by the layer's name; rising with the width.
        widths: widths in the order of the rows, rising.
        budget: budget in the unit of the costs.
        exact: spend the whole budget, even where that saves no loss; otherwise spend at most the budget.
        stack: name of the stack that a layer belongs to; layers of one stack have equal costs, others are in none.
        per_layer: give all groups of a layer one width, and all layers of a stack. Where no such widths spend the whole
            budget, they spend less, also with `exact`.

    Returns:
        The widths; the gap is that to the best widths of the ranks, or of whole layers.

    Raises:
        ValueError: if a loss is not finite, or no widths fit the budget.
    """
    members = stack_members(losses, stack)
    if per_layer:
        return _allocate_layers(losses, costs, widths, budget, exact, members)
    orders = {name: _ranking(table.cpu(), costs[name].cpu()) for name, table in losses.items() if name in stack}
    pooled = {
        name: torch.stack([losses[layer].cpu()[:, orders[layer]] for layer in layers]).sum(0)
        if layers[0] in stack
        else losses[name]
        for name, layers in members.items()
    }
    found = allocate(pooled, pool_costs(costs, stack), widths, budget, exact)
    bits = {}
    for name, layers in members.items():
        for layer in layers:
            own = found.bits[name]
            bits[layer] = own if layer not in stack else torch.empty_like(own).scatter(0, orders[layer], own)
    return Allocation({name: bits[name] for name in losses}, found.gap)


def _allocate_layers(
    losses: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    widths: Sequence[int],
    budget: int,
    exact: bool,
    members: Mapping[str, list[str]],
) -> Allocation:
    """Find one width for each stack, and for each layer in none; `members` are those of `stack_members`."""

    def summed(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.stack([tables[layer].cpu().sum(1, keepdim=True) for layer in layers]).sum(0)
            for name, layers in members.items()
        }

    whole = partial(allocate, summed(losses), summed(costs), widths, budget)
    try:
        found = whole(exact=exact)
    except ValueError:
        if not exact:
            raise
        found = whole(exact=False)
    bits = {layer: found.bits[name].repeat(losses[layer].shape[1]) for name, own in members.items() for layer in own}
    return Allocation({name: bits[name] for name in losses}, found.gap)


def pool_costs(costs: Mapping[str, Tensor], stack: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the costs of ranks of groups `[widths, groups]`, by the name of a stack, or of a layer in none."""
    return {
        name: len(layers) * costs[layers[0]][:, _by_cost(costs[layers[0]])] if layers[0] in stack else costs[name]
        for name, layers in stack_members(costs, stack).items()
    }


def stack_members(layers: Mapping[str, Tensor], stack: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the layers by the name of their stack; a layer in none is alone by its own name."""
    members: dict[str, list[str]] = {}
    for name in layers:
        members.setdefault(stack.get(name, name), []).append(name)
    return members


def _ranking(losses: Tensor, costs: Tensor) -> Tensor:
    """Return the groups of a layer in the order of their ranks: by cost, then by what the widest width saves.

    Groups of different cost, as a shorter last one, never have the same rank.
    """
    order = torch.argsort(losses[0] - losses[-1], descending=True, stable=True)
    return order[_by_cost(costs[:, order])]


def _by_cost(costs: Tensor) -> Tensor:
    """Return the groups, `[groups]`, of costs `[widths, groups]` from the cheapest to the dearest."""
    return torch.argsort(costs[-1], stable=True)
