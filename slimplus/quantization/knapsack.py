"""Widths for many groups under one budget: a multiple-choice knapsack, with a bound on how far the result is from best.

The linear relaxation is solved exactly: the steps along each group's lower convex hull are taken in the order of the
loss they save per cost (Dyer 1984, Zemel 1984, doi.org/10.1007/BF02592213). Dynamic programming over the groups that
are nearest to changing (the core, doi.org/10.1016/0377-2217(94)00015-8) then spends the rest of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimplus.format.affine import group_count
from slimplus.format.planes import packed_size

CORE = 128  # groups in the core at first; the number doubles while they cannot spend the budget


@dataclass(frozen=True)
class Allocation:
    """The widths of all groups, and how far they may be from the best ones.

    Attributes:
        bits: the widths of each layer's groups, `[groups]`, int32, by the layer's name.
        gap: a share of the loss: no allocation within the budget has less than `(1 - gap)` times this one's.
    """

    bits: dict[str, Tensor]
    gap: float


def bit_costs(rows: int, columns: int, group_size: int, widths: Sequence[int]) -> Tensor:
    """Return the bits that the integers of each group take at each width, `[widths, groups]`, int64.

    Args:
        rows: rows of the weight.
        columns: columns of the weight.
        group_size: columns a group.
        widths: widths in the order of the result's rows.
    """
    sizes = torch.full((group_count(columns, group_size),), group_size)
    sizes[-1] = columns - group_size * (len(sizes) - 1)
    return torch.tensor(widths)[:, None] * sizes * rows


def byte_costs(rows: int, columns: int, group_size: int, widths: Sequence[int], scale_bits: int = 16) -> Tensor:
    """Return the bytes that each group takes in the packed format at each width, `[widths, groups]`, int64.

    They include the group's scales, zero points and width. The exponents of 8-bit scales, which the groups of a weight
    share, are counted with the first group.

    Args:
        rows: rows of the weight.
        columns: columns of the weight.
        group_size: columns a group.
        widths: widths in the order of the result's rows.
        scale_bits: bits that a scale takes, 8 or 16.
    """
    first, second = (
        torch.tensor([packed_size(rows, {width: groups}, group_size, scale_bits) for width in widths])
        for groups in (1, 2)
    )
    costs = (second - first)[:, None].repeat(1, group_count(columns, group_size))
    costs[:, 0] = first
    return costs


def costs_and_budget(
    shapes: Mapping[str, tuple[int, int]],
    bits: int,
    group_size: int,
    widths: Sequence[int],
    size_bytes: int | None = None,
    scale_bits: int = 16,
) -> tuple[dict[str, Tensor], int]:
    """Return the costs and the budget that `allocate` takes.

    Args:
        shapes: `[out, in]` of each layer's weight, by the layer's name.
        bits: average width, which is the budget where no size is given; costs are then bits.
        group_size: columns a group.
        widths: widths to choose from, rising.
        size_bytes: budget for the packed layers; costs are then bytes.
        scale_bits: bits that a scale takes in the packed format.
    """
    price = bit_costs if size_bytes is None else partial(byte_costs, scale_bits=scale_bits)
    costs = {name: price(*shape, group_size, widths) for name, shape in shapes.items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    return costs, bits * weights if size_bytes is None else size_bytes


def check_budget(costs: Iterable[Tensor], widths: Sequence[int], budget: int, exact: bool) -> None:
    """Check that some choice of widths meets the budget.

    Args:
        costs: costs of each layer's groups, `[widths, groups]`, int64.
        widths: widths in the order of the rows, rising.
        budget: budget in the unit of the costs.
        exact: whether the budget must be spent exactly.

    Raises:
        ValueError: if the narrowest widths cost more than the budget, or if it must be spent exactly and the widest
            cost less, or no steps between the widths add up to it.
    """
    cost = torch.cat([table.T for table in costs])
    least, most, unit = _range(cost)
    if not least <= budget or (exact and budget > most):
        raise ValueError(f"the widths {list(widths)} cost {least:,} to {most:,}, and the budget is {budget:,}")
    rest = (budget - least) % unit
    if exact and rest:
        raise ValueError(
            f"the widths {list(widths)} cannot cost {budget:,} exactly, only {budget - rest:,} or "
            f"{budget - rest + unit:,}"
        )


def _range(cost: Tensor) -> tuple[int, int, int]:
    """Return the least and the largest sum of costs `[groups, widths]`, and the unit in which sums differ."""
    return int(cost[:, 0].sum()), int(cost[:, -1].sum()), math.gcd(*(cost[:, 1:] - cost[:, :-1]).unique().tolist()) or 1


def allocate(
    losses: Mapping[str, Tensor], costs: Mapping[str, Tensor], widths: Sequence[int], budget: int, exact: bool
) -> Allocation:
    """Find the widths with the smallest sum of losses whose costs meet a budget.

    Args:
        losses: loss of each group at each width, `[widths, groups]`, by the layer's name.
        costs: cost of each group at each width, `[widths, groups]`, int64, by the layer's name; rising with the width.
        widths: widths in the order of the rows, rising.
        budget: budget in the unit of the costs.
        exact: spend the whole budget, even where that saves no loss; otherwise spend at most the budget.

    Raises:
        ValueError: if a loss is not finite, or no widths fit the budget.
    """
    for name, table in losses.items():
        if not table.isfinite().all():
            raise ValueError(f"{name} has a sensitivity that is not finite; check its weights and the calibration data")
    loss = torch.cat([table.T.double().cpu() for table in losses.values()])  # [groups, widths]
    check_budget([costs[name] for name in losses], widths, budget, exact)
    cost = torch.cat([costs[name].T.cpu() for name in losses])
    least, _, unit = _range(cost)
    spent = (cost - cost[:, :1]) // unit  # beyond the narrowest width
    room = (budget - least) // unit
    choice, price = _solve_relaxation(loss, spent, room, exact)
    room -= int(spent.gather(1, choice[:, None]).sum())
    bound = float(loss.gather(1, choice[:, None]).sum()) - price * room
    choice = _spend_rest(loss, spent, choice, price, room, exact)
    total = float(loss.gather(1, choice[:, None]).sum())
    found = torch.tensor(widths, dtype=torch.int32)[choice].split([table.shape[1] for table in losses.values()])
    return Allocation(dict(zip(losses, found, strict=True)), max(total - bound, 0) / max(abs(total), 1e-300))


def _solve_relaxation(loss: Tensor, spent: Tensor, room: int, exact: bool) -> tuple[Tensor, float]:
    """Take the whole steps of the linear relaxation's solution.

    Args:
        loss: `[groups, widths]`.
        spent: cost of each width beyond that of the narrowest, `[groups, widths]`.
        room: budget beyond the cost of the narrowest widths.
        exact: also take steps that save no loss.

    Returns:
        The index of each group's width, `[groups]`, and the loss per unit of cost that the next step would save.
    """
    groups, count = loss.shape
    at = torch.zeros(groups, dtype=torch.int64)
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while (at < count - 1).any():
        # The next corner of a group's lower convex hull is the wider width that saves the most loss per cost.
        ahead = torch.arange(count) > at[:, None]
        here = at[:, None]
        rate = (loss.gather(1, here) - loss) / (spent - spent.gather(1, here)).clamp(min=1)
        best, to = rate.masked_fill(~ahead, -torch.inf).max(dim=1)
        moving = (at < count - 1).nonzero()[:, 0]
        steps.append(
            (moving, to[moving], best[moving], (spent.gather(1, to[:, None]) - spent.gather(1, here))[moving, 0])
        )
        at = torch.where(ahead.any(1), to, at)
    if not steps:
        return at, 0.0
    group, to, rate, weight = (torch.cat(parts) for parts in zip(*steps, strict=True))
    order = torch.argsort(rate, descending=True, stable=True)
    taken = weight[order].cumsum(0) <= room
    if not exact:
        taken &= rate[order] > 0
    whole = int(taken.int().cumprod(0).sum())
    choice = torch.zeros(groups, dtype=torch.int64)
    choice.scatter_reduce_(0, group[order[:whole]], to[order[:whole]], "amax")  # a group's last step is its widest
    price = float(rate[order[whole]]) if whole < len(order) else 0.0
    return choice, price if exact else max(price, 0.0)


def _spend_rest(loss: Tensor, spent: Tensor, choice: Tensor, price: float, room: int, exact: bool) -> Tensor:
    """Change the widths of some groups so that the rest of the budget is spent.

    Args:
        loss: `[groups, widths]`.
        spent: cost of each width beyond that of the narrowest, `[groups, widths]`.
        choice: index of each group's width so far, `[groups]`.
        price: loss per unit of cost at which the relaxation stopped; groups whose change costs little at this price
            come first into the core.
        room: rest of the budget, at least 0.
        exact: spend exactly the rest, not less.

    Returns:
        The index of each group's width, `[groups]`.

    Raises:
        ValueError: if no widths spend the budget exactly.
    """
    if room == 0:
        return choice
    moves = spent - spent.gather(1, choice[:, None])
    gains = loss.gather(1, choice[:, None]) - loss
    regret = (price * moves - gains).scatter(1, choice[:, None], torch.inf)
    order = torch.argsort(regret.min(dim=1).values, stable=True)
    core, reach = CORE, 2 * int(moves.abs().max())
    while True:
        members = order[:core]
        found = _cheapest_changes(moves[members], -gains[members], room, reach, exact)
        if found is not None:
            return choice.scatter(0, members, found)
        if core >= len(order) and reach >= int(spent[:, -1].sum()):
            raise ValueError(
                f"no widths spend the budget exactly: {room} units of it are left; give other widths or another budget"
            )
        core, reach = 2 * core, 2 * reach


def _cheapest_changes(moves: Tensor, added: Tensor, room: int, reach: int, exact: bool) -> Tensor | None:
    """Find by dynamic programming the options with the least added loss that together spend the rest of the budget.

    Args:
        moves: cost of each option beyond that of its group's present width, `[members, options]`.
        added: loss of each option beyond that of its group's present width, `[members, options]`.
        room: rest of the budget.
        reach: how far the sum may fall below 0 and rise above `room` on the way.
        exact: spend exactly `room`, not less.

    Returns:
        The index of each member's option, `[members]`, or None if no options spend it.
    """
    states = room + 2 * reach + 1  # state s stands for a sum of s - reach
    best = torch.full((states,), torch.inf, dtype=torch.float64)
    best[reach] = 0
    chosen = torch.zeros(len(moves), states, dtype=torch.uint8)
    for member, (costs, losses) in enumerate(zip(moves.tolist(), added.tolist(), strict=True)):
        shifted = torch.full((len(costs), states), torch.inf, dtype=torch.float64)
        for option, (move, loss) in enumerate(zip(costs, losses, strict=True)):
            if abs(move) < states:
                start, stop = max(move, 0), min(states + move, states)
                shifted[option, start:stop] = best[start - move : stop - move] + loss
        best, option_of = shifted.min(dim=0)
        chosen[member] = option_of.to(torch.uint8)
    target = reach + room
    state = target if exact else int(best[: target + 1].argmin())
    if not best[state].isfinite():
        return None
    found = torch.zeros(len(moves), dtype=torch.int64)
    for member in reversed(range(len(moves))):
        found[member] = chosen[member, state]
        state -= int(moves[member, found[member]])
    return found
