"""Widths under one budget: against every allocation there is, and the budgets that none meets."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimplus.format.affine import SCALE_BITS
from slimplus.format.planes import packed_size
from slimplus.quantization.knapsack import allocate, bit_costs, byte_costs

WIDTHS = (1, 2, 3)
SHAPES = {"a": (16, 96), "b": (48, 64), "c": (16, 40)}  # the last group of c is a short one
PRICES = {name: bit_costs(*shape, 32, WIDTHS) for name, shape in SHAPES.items()}


def tables(values: list[float]) -> dict[str, torch.Tensor]:
    """Losses `[widths, groups]` by layer, from one list."""
    counts = [cost.numel() for cost in PRICES.values()]
    parts = torch.tensor(values, dtype=torch.float64).split(counts)
    return {name: part.reshape(PRICES[name].shape) for name, part in zip(PRICES, parts, strict=True)}


def total(tables: dict[str, torch.Tensor], bits: dict[str, torch.Tensor]) -> float:
    """Sum of a table's entries at the widths of `bits`."""
    return sum(
        float(table[bits[name].long() - 1, torch.arange(table.shape[1])].sum()) for name, table in tables.items()
    )


def by_enumeration(losses: dict[str, torch.Tensor], budget: int, exact: bool) -> float:
    """The smallest loss of all allocations within the budget."""
    loss = torch.cat([losses[name].T for name in losses])
    cost = torch.cat([PRICES[name].T for name in losses])
    best = float("inf")
    for choice in product(range(len(WIDTHS)), repeat=len(loss)):
        index = torch.tensor(choice)[:, None]
        spent = int(cost.gather(1, index).sum())
        if spent == budget or (spent <= budget and not exact):
            best = min(best, float(loss.gather(1, index).sum()))
    return best


@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(0, 8), min_size=21, max_size=21),
    chosen=st.lists(st.sampled_from(WIDTHS), min_size=7, max_size=7),
)
def test_nothing_is_better(exact: bool, values: list[float], chosen: list[int]) -> None:
    losses = tables(values)
    counts = [cost.shape[1] for cost in PRICES.values()]
    some = dict(zip(PRICES, torch.tensor(chosen, dtype=torch.int32).split(counts), strict=True))
    budget = int(total({name: cost.double() for name, cost in PRICES.items()}, some))
    found = allocate(losses, PRICES, WIDTHS, budget, exact)
    spent = total({name: cost.double() for name, cost in PRICES.items()}, found.bits)
    assert spent == budget if exact else spent <= budget
    least, loss = by_enumeration(losses, budget, exact), total(losses, found.bits)
    assert loss == pytest.approx(least)
    assert (1 - found.gap) * loss <= least + 1e-9


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), convex=st.booleans())
def test_the_gap_of_a_large_model_is_small(seed: int, convex: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{block}.{name}": shape for block in range(8) for name, shape in {"q": (576, 576), "u": (1536, 576)}.items()
    }
    costs = {name: bit_costs(*shape, 64, (1, 2, 3, 4)) for name, shape in shapes.items()}
    losses = {}
    for name, cost in costs.items():
        scale = torch.rand(cost.shape[1], generator=generator).exp()
        noise = torch.ones(cost.shape) if convex else 0.5 + torch.rand(cost.shape, generator=generator)
        losses[name] = scale * 4.0 ** -torch.arange(4.0)[:, None] * noise
    budget = 2 * sum(rows * columns for rows, columns in shapes.values())
    found = allocate(losses, costs, (1, 2, 3, 4), budget, exact=True)
    assert sum(int(found.bits[name].sum()) * rows * 64 for name, (rows, _) in shapes.items()) == budget
    assert found.gap < 0.01


def test_equal_losses_make_no_difference_to_the_budget() -> None:
    losses = {name: torch.ones(cost.shape) for name, cost in PRICES.items()}
    budget = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    found = allocate(losses, PRICES, WIDTHS, budget, exact=True)
    assert total({name: cost.double() for name, cost in PRICES.items()}, found.bits) == budget
    assert found.gap == 0


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_bytes_are_those_of_the_packed_format(scale_bits: int) -> None:
    for rows, columns in SHAPES.values():
        cost = byte_costs(rows, columns, 32, WIDTHS, scale_bits)
        groups = cost.shape[1]
        for row, width in enumerate(WIDTHS):
            assert int(cost[row].sum()) == packed_size(rows, {width: groups}, 32, scale_bits)
        assert int(cost[0, 0] + cost[2, 1:].sum()) == packed_size(rows, {1: 1, 3: groups - 1}, 32, scale_bits)


def test_budgets_that_cannot_be_met() -> None:
    losses = {name: torch.ones(cost.shape) for name, cost in PRICES.items()}
    with pytest.raises(ValueError, match="the budget is 100"):
        allocate(losses, PRICES, WIDTHS, 100, exact=False)
    with pytest.raises(ValueError, match="the budget is 1,000,000"):
        allocate(losses, PRICES, WIDTHS, 1000000, exact=True)
    least = sum(int(cost[0].sum()) for cost in PRICES.values())
    with pytest.raises(ValueError, match="cannot cost .* exactly"):
        allocate(losses, PRICES, WIDTHS, least + 1, exact=True)
    losses["b"][1, 1] = float("nan")
    with pytest.raises(ValueError, match="b has a sensitivity that is not finite"):
        allocate(losses, PRICES, WIDTHS, least, exact=False)


def test_a_budget_between_what_the_groups_can_spend() -> None:
    costs = {"a": torch.tensor([[2], [5]]), "b": torch.tensor([[2], [7]])}  # 0, 3, 5, 8 beyond the least
    losses = {name: torch.tensor([[1.0], [0.0]]) for name in costs}
    with pytest.raises(ValueError, match="no widths spend the budget exactly"):
        allocate(losses, costs, (1, 2), 8, exact=True)
