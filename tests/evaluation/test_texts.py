"""Which predictions of an evaluation text count."""

from __future__ import annotations

import pytest
import torch

from slimplus.evaluation.texts import counted_tokens


@pytest.mark.parametrize(("stride", "bos"), [(1, False), (30, False), (99, False), (30, True), (99, True)])
def test_each_token_counts_once_with_overlapping_windows(stride: int, bos: bool) -> None:
    starts = [number * stride for number in range(5)]
    counted = counted_tokens(5, 100, stride)
    predicted = [
        start + int(place) + 1 - bos
        for start, row in zip(starts, counted, strict=True)
        for place in row.nonzero().flatten()
    ]
    assert predicted == list(range(1 - bos, starts[-1] + 100 - bos))


def test_side_by_side_all_but_the_first_token_of_a_window_count() -> None:
    assert counted_tokens(3, 100).all()
    assert torch.equal(counted_tokens(3, 100), counted_tokens(3, 100, 100))
