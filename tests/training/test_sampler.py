"""Which windows meet in a step, on any number of ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slimplus.distributed.ranks import Ranks
from slimplus.training.sampler import StepSampler


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
