"""Several processes: who does what, which windows meet in a step, and that their number does not show in the result."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.quantization.salience import HessianAccumulator
from slimplus.training.ranks import Ranks
from slimplus.training.sampling import StepSampler


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 100), min_size=1), st.integers(1, 5))
def test_work_is_shared_out_by_size(costs: dict[str, int], count: int) -> None:
    owners = Ranks(0, count).owners(costs)
    assert owners == Ranks(count - 1, count).owners(dict(reversed(costs.items()))), "ranks must agree"
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(count)]
    assert sum(loads) == sum(costs.values())
    assert max(loads) <= min(loads) + max(costs.values())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3))
def test_a_step_takes_the_same_windows_on_any_number_of_ranks(count: int, share: int, steps: int, epoch: int) -> None:
    batch_size = count * share

    def windows(rank: int, ranks: int) -> list[list[int]]:
        """What `rank` takes in each step of an epoch."""
        sampler = StepSampler(steps * batch_size, batch_size, Ranks(rank, ranks), seed=3)
        sampler.set_epoch(epoch)
        order = [place * ranks + rank for place in sampler]
        assert len(order) == len(sampler)
        return [order[start : start + batch_size // ranks] for start in range(0, len(order), batch_size // ranks)]

    alone = [set(step) for step in windows(0, 1)]
    together = [set().union(*parts) for parts in zip(*(windows(rank, count) for rank in range(count)), strict=True)]
    assert together == alone
    assert set().union(*alone) == set(range(steps * batch_size))
    assert all(len(step) == batch_size for step in alone)


def test_epochs_differ_in_their_order() -> None:
    sampler = StepSampler(32, 2, Ranks(), seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(32))
    assert first != list(sampler)


def test_the_search_looks_at_the_same_windows_on_any_number_of_ranks() -> None:
    for total in (1, 5, 8):
        assert sum(Ranks(rank, 3).windows(total) for rank in range(3)) == total
    assert [Ranks(rank, 3).windows(1) for rank in range(3)] == [1, 0, 0]


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_hessian_does_not_show_how_its_windows_were_shared(seed: int, count: int) -> None:
    inputs = torch.randn(12, 16, 24, generator=torch.Generator().manual_seed(seed))
    sums = [HessianAccumulator(24, torch.device("cpu")) for _ in range(count)]
    for index, window in enumerate(inputs):
        sums[index % count].add(window)
    whole = HessianAccumulator(24, torch.device("cpu"))
    for window in inputs:
        whole.add(window)
    for part in sums[1:]:
        sums[0].total += part.total
        sums[0].tokens += part.tokens
    assert torch.equal(sums[0].hessian, whole.hessian)
