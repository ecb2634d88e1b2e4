"""Salience-determined bit allocation: the average is kept, and mixing happens where it pays."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimplus.format.affine import (
    per_column,
)
from slimplus.quantization.salience_allocation import AllocationSearch, largest_pair_count, paired_bits
from tests.support.weights import GROUP_SIZES


@given(st.integers(1, 400), st.sampled_from(GROUP_SIZES), st.integers(2, 7), st.integers(0, 2**32), st.integers(0, 20))
@settings(max_examples=100)
def test_the_average_is_kept_exactly(in_features: int, group_size: int, target: int, seed: int, pairs: int) -> None:
    groups = -(-in_features // group_size)
    salience = torch.rand(groups, generator=torch.Generator().manual_seed(seed))
    pairs = min(pairs, largest_pair_count(in_features, group_size))
    bits = paired_bits(salience, pairs, target, in_features, group_size)
    assert int(per_column(bits, group_size, in_features).sum()) == target * in_features
    assert int((bits != target).sum()) == 2 * pairs
    if pairs:
        assert salience[bits < target].max() <= salience[bits > target].min()


def test_no_pair_is_chosen_where_mixing_does_not_pay() -> None:
    """Equal groups of Gaussian weights: taking a bit from one costs more than giving it to another returns."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 512, generator=generator), torch.randn(256, 512, generator=generator)
    search = AllocationSearch(weight, torch.rand(8, generator=generator), 3, 64)
    search.add(inputs)
    assert int(search.divergence.argmin()) == 0


def test_search_adds_up_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 256, generator=generator), torch.randn(64, 256, generator=generator)
    whole, parts = (AllocationSearch(weight, torch.arange(8.0), 2, 32) for _ in range(2))
    whole.add(inputs)
    for batch in inputs.split(16):
        parts.add(batch)
    torch.testing.assert_close(whole.divergence, parts.divergence, rtol=1e-4, atol=0)
