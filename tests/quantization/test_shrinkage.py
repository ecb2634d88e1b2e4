"""The Hessian of an expert, between its own inputs and those of all experts."""

from __future__ import annotations

import torch

from slimplus.quantization.salience import SHRINKAGE, HessianAccumulator, shrunk_hessian

COLUMNS, CPU = 16, torch.device("cpu")


def accumulator(inputs: torch.Tensor) -> HessianAccumulator:
    found = HessianAccumulator(COLUMNS, CPU)
    found.add(inputs)
    return found


def test_an_expert_without_tokens_has_the_hessian_of_all_experts() -> None:
    shared = accumulator(torch.randn(40, COLUMNS))
    torch.testing.assert_close(shrunk_hessian(HessianAccumulator(COLUMNS, CPU), shared), shared.hessian)


def test_the_two_count_by_their_tokens() -> None:
    own, shared = accumulator(torch.randn(8, COLUMNS)), accumulator(torch.randn(40, COLUMNS))
    prior = SHRINKAGE * COLUMNS
    expected = (8 * own.hessian + prior * shared.hessian) / (8 + prior)
    torch.testing.assert_close(shrunk_hessian(own, shared), expected)


def test_no_tokens_at_all_give_zeros_not_nan() -> None:
    empty = HessianAccumulator(COLUMNS, CPU)
    assert torch.equal(shrunk_hessian(empty, empty), torch.zeros(COLUMNS, COLUMNS))


def test_sums_of_two_parts_are_those_of_the_whole() -> None:
    inputs = torch.randn(30, COLUMNS)
    merged = accumulator(inputs[:10])
    merged.merge(accumulator(inputs[10:]))
    assert merged.tokens == 30
    torch.testing.assert_close(merged.hessian, accumulator(inputs).hessian)
