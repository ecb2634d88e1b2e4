"""Widths of experts: equal numbers of each width in a stack, at free positions, within the budget."""

from __future__ import annotations

from collections import Counter
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.quantization.knapsack import bit_costs
from slimplus.quantization.stack_allocation import allocate_stacks, pool_costs

WIDTHS = (1, 2, 3)
EXPERTS = [f"experts.up.{expert}" for expert in range(3)]
STACK = dict.fromkeys(EXPERTS, "experts.up")
PRICES = {"q": bit_costs(48, 64, 32, WIDTHS)} | {name: bit_costs(16, 112, 32, WIDTHS) for name in EXPERTS}  # 4 groups


def losses(seed: int) -> dict[str, torch.Tensor]:
    """Random losses that fall with the width."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(cost.shape, generator=generator).sort(0, True).values for name, cost in PRICES.items()}


def spent(bits: dict[str, torch.Tensor]) -> int:
    return sum(int(PRICES[name].gather(0, (own.long() - 1)[None]).sum()) for name, own in bits.items())


@given(seed=st.integers(0, 10_000), extra=st.integers(0, 3))
def test_the_experts_of_a_stack_keep_equal_numbers_of_widths(seed: int, extra: int) -> None:
    budget = sum(int(cost[1].sum()) for cost in PRICES.values()) + extra * 48 * 32
    bits = allocate_stacks(losses(seed), PRICES, WIDTHS, budget, exact=extra == 0, stack=STACK).bits
    assert list(bits) == list(PRICES)
    assert len({tuple(sorted(Counter(bits[name].tolist()).items())) for name in EXPERTS}) == 1
    assert len({int(bits[name][-1]) for name in EXPERTS}) == 1  # the short group
    assert spent(bits) == budget if extra == 0 else spent(bits) <= budget


def test_each_expert_has_its_widest_groups_where_they_save_most() -> None:
    tables = {name: torch.zeros(cost.shape) for name, cost in PRICES.items()}
    for expert, name in enumerate(EXPERTS):
        tables[name][0, expert] = 9.0  # what one bit costs in this group
    budget = sum(int(cost[0].sum()) for cost in PRICES.values()) + 3 * 16 * 32
    bits = allocate_stacks(tables, PRICES, WIDTHS, budget, exact=True, stack=STACK).bits
    assert [bits[name].tolist() for name in EXPERTS] == [[2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1]]
    assert bits["q"].tolist() == [1, 1]


def test_costs_of_a_stack_are_those_of_all_its_experts() -> None:
    pooled = pool_costs(PRICES, STACK)
    assert set(pooled) == {"q", "experts.up"}
    assert sum(int(cost.sum()) for cost in pooled.values()) == sum(int(cost.sum()) for cost in PRICES.values())


@given(seed=st.integers(0, 10_000), extra=st.integers(0, 48 * 64))
def test_a_layer_or_a_stack_has_one_width_where_that_is_asked_for(seed: int, extra: int) -> None:
    even = sum(int(cost[1].sum()) for cost in PRICES.values())  # 2 bits everywhere
    tables = losses(seed)
    bits = allocate_stacks(tables, PRICES, WIDTHS, even, exact=True, stack=STACK, per_layer=True).bits
    assert {name: own.unique().numel() for name, own in bits.items()} == dict.fromkeys(PRICES, 1)
    assert len({int(bits[name][0]) for name in EXPERTS}) == 1
    assert spent(bits) == even
    more = allocate_stacks(tables, PRICES, WIDTHS, even + extra, exact=True, stack=STACK, per_layer=True).bits
    assert spent(more) <= even + extra


def test_whole_layers_get_the_widths_with_the_smallest_loss() -> None:
    """Against all choices, for a budget that no layers spend exactly."""
    tables, budget = losses(3), 20_000
    layers = {"q": ["q"], "experts": EXPERTS}
    totals = {}
    for first, second in product(range(3), repeat=2):
        chosen = {"q": first, "experts": second}
        cost = sum(int(PRICES[name][chosen[kind]].sum()) for kind, own in layers.items() for name in own)
        loss = sum(float(tables[name][chosen[kind]].sum()) for kind, own in layers.items() for name in own)
        if cost <= budget:
            totals[first, second] = loss
    best = min(totals, key=lambda choice: totals[choice])
    found = allocate_stacks(tables, PRICES, WIDTHS, budget, exact=True, stack=STACK, per_layer=True).bits
    assert (int(found["q"][0]) - 1, int(found[EXPERTS[0]][0]) - 1) == best
    assert spent(found) < budget
