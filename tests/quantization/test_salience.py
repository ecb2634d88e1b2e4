"""Hessians, their inverses, and the salience computed from both."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.quantization.salience import HessianAccumulator, group_salience, invert_hessian
from tests.support.weights import layer_and_hessian


def test_groups_whose_inputs_are_always_zero_are_not_salient() -> None:
    weight, hessian = layer_and_hessian()
    hessian = hessian * 1e-3  # so that the ones in the places of dead columns are large
    hessian[:64] = hessian[:, :64] = 0
    salience = group_salience(weight, invert_hessian(hessian), 64)
    assert salience[0] == 0
    assert (salience[1:] > 0).all()


def test_hessian_is_accumulated_in_float32_under_autocast() -> None:
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    accumulator = HessianAccumulator(32, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.add(inputs.view(2, 32, 32))
    assert accumulator.tokens == 64
    torch.testing.assert_close(accumulator.hessian, 2 / 64 * inputs.T @ inputs, rtol=1e-5, atol=1e-5)


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
