"""Widths for many groups under one budget: a multiple-choice knapsack, solved with a bound on what the best could save.

The linear relaxation is solved exactly by taking the steps of each group's lower convex hull in the order of what they
save per cost (Dyer 1984, Zemel 1984, doi.org/10.1007/BF02592213). Dynamic programming over the groups that are nearest
to changing (the core, doi.org/10.1016/0377-2217(94)00015-8) then spends what the last whole step left of the budget.
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

CORE = 128  # groups at first; twice as many wherever they cannot spend the budget


@dataclass(frozen=True)
class Allocation:
    """Widths, and how good they are.

    Attributes:
        bits: `[groups]`, int32, by layer.
        gap: no allocation within the budget has a loss below `(1 - gap)` times this one's.
    """

    bits: dict[str, Tensor]
    gap: float


def bit_costs(rows: int, columns: int, group_size: int, widths: Sequence[int]) -> Tensor:
    """Bits that the integers of each group of a `[rows, columns]` weight take, `[widths, groups]`, int64."""
    sizes = torch.full((group_count(columns, group_size),), group_size)
    sizes[-1] = columns - group_size * (len(sizes) - 1)
    return torch.tensor(widths)[:, None] * sizes * rows


def byte_costs(rows: int, columns: int, group_size: int, widths: Sequence[int], scale_bits: int = 16) -> Tensor:
    """Bytes that each group takes in the packed format, its scales, zero points and widths included, likewise.

    What the groups of a weight share, the exponents of 8-bit scales, is counted with the first one.
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
    """What `allocate` takes for layers of `shapes`: bits under an average of `bits`, or bytes where a size is given."""
    price = bit_costs if size_bytes is None else partial(byte_costs, scale_bits=scale_bits)
    costs = {name: price(*shape, group_size, widths) for name, shape in shapes.items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    return costs, bits * weights if size_bytes is None else size_bytes


def check_budget(costs: Iterable[Tensor], widths: Sequence[int], budget: int, exact: bool) -> None:
    """Check that some widths meet a budget; the arguments are those of `allocate`.

    Raises:
        ValueError: if the narrowest cost more than it or, where it is to be met exactly, the widest less, or if what
            one group can change does not divide it.
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
    """Least and largest sum of the costs `[groups, widths]`, and the unit of what they can be between these."""
    return int(cost[:, 0].sum()), int(cost[:, -1].sum()), math.gcd(*(cost[:, 1:] - cost[:, :-1]).unique().tolist()) or 1


def allocate(
    losses: Mapping[str, Tensor], costs: Mapping[str, Tensor], widths: Sequence[int], budget: int, exact: bool
) -> Allocation:
    """The widths with the smallest sum of losses whose costs add up to `budget`.

    Args:
        losses: `[widths, groups]` by layer.
        costs: int64, likewise; rising with the width.
        widths: in the order of the rows, rising.
        budget: in the units of the costs.
        exact: spend all of it, even where that gains nothing; otherwise at most all.

    Raises:
        ValueError: if a loss is not finite, or no widths fit the budget.
    """
    for name, table in losses.items():
        if not table.isfinite().all():
            raise ValueError(f"{name} has a sensitivity that is not finite")
    loss = torch.cat([table.T.double().cpu() for table in losses.values()])  # [groups, widths]
    check_budget([costs[name] for name in losses], widths, budget, exact)
    cost = torch.cat([costs[name].T.cpu() for name in losses])
    least, _, unit = _range(cost)
    spent = (cost - cost[:, :1]) // unit  # beyond the narrowest width
    room = (budget - least) // unit
    choice, price = _relaxed(loss, spent, room, exact)
    room -= int(spent.gather(1, choice[:, None]).sum())
    bound = float(loss.gather(1, choice[:, None]).sum()) - price * room
    choice = _spend(loss, spent, choice, price, room, exact)
    total = float(loss.gather(1, choice[:, None]).sum())
    found = torch.tensor(widths, dtype=torch.int32)[choice].split([table.shape[1] for table in losses.values()])
    return Allocation(dict(zip(losses, found, strict=True)), max(total - bound, 0) / max(abs(total), 1e-300))


def _relaxed(loss: Tensor, spent: Tensor, room: int, exact: bool) -> tuple[Tensor, float]:
    """The whole steps of the linear relaxation, as the index of each group's width, and what a unit of cost saves next.

    Args:
        loss: `[groups, widths]`.
        spent: cost of each width beyond the narrowest.
        room: what there is to spend.
        exact: take steps that save nothing too.
    """
    groups, count = loss.shape
    at = torch.zeros(groups, dtype=torch.int64)
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while (at < count - 1).any():
        # The next corner of the lower convex hull: from here, the width that saves the most per cost.
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
    choice.scatter_reduce_(0, group[order[:whole]], to[order[:whole]], "amax")  # steps of a group come in order
    price = float(rate[order[whole]]) if whole < len(order) else 0.0
    return choice, price if exact else max(price, 0.0)


def _spend(loss: Tensor, spent: Tensor, choice: Tensor, price: float, room: int, exact: bool) -> Tensor:
    """Change the widths of some groups so that `room`, not negative, is spent; `choice` as it is to be."""
    if room == 0:
        return choice
    moves = spent - spent.gather(1, choice[:, None])
    gains = loss.gather(1, choice[:, None]) - loss
    regret = (price * moves - gains).scatter(1, choice[:, None], torch.inf)
    order = torch.argsort(regret.min(dim=1).values, stable=True)
    core, reach = CORE, 2 * int(moves.abs().max())
    while True:
        members = order[:core]
        found = _program(moves[members], -gains[members], room, reach, exact)
        if found is not None:
            return choice.scatter(0, members, found)
        if core >= len(order) and reach >= int(spent[:, -1].sum()):
            raise ValueError(f"no widths spend the budget exactly; the nearest leave {room} units of it")
        core, reach = 2 * core, 2 * reach


def _program(moves: Tensor, added: Tensor, room: int, reach: int, exact: bool) -> Tensor | None:
    """Options `[members]` with the least added loss that spend `room` in all, or None if none do.

    Args:
        moves: cost of each option, `[members, options]`, beyond where its member stands.
        added: its loss, likewise.
        room: what is to be spent, or at most.
        reach: how far below 0 and above `room` the sum may come on the way.
        exact: spend neither more nor less.
    """
    states = room + 2 * reach + 1  # state s stands for s - reach spent
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
