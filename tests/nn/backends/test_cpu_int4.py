"""PyTorch's int4 operator on a CPU, for packed layers of up to 4 bits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimplus.format.affine import per_column
from slimplus.nn import PackedLinear
from slimplus.nn.backends.cpu_int4 import MAX_ROWS, Int4Weight
from slimplus.nn.fusion import FusedLinears
from tests.support.layers import TOLERANCE, inputs_of, random_weight


@given(
    group_size=st.sampled_from([32, 64, 96, 128, 512]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 700),
    rows=st.integers(1, 5),
    widths=st.sets(st.integers(1, 4), min_size=1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_int4_is_as_exact_as_bfloat16(
    group_size: int, out_features: int, in_features: int, rows: int, widths: set[int], seed: int
) -> None:
    weights = [random_weight(out_features + extra, in_features, group_size, tuple(widths), seed) for extra in (0, 3)]
    inputs = inputs_of(rows, in_features)
    found = Int4Weight.from_quantized(weights).linear(inputs)
    expected = inputs.double() @ torch.cat([weight.dequantize() for weight in weights]).double().T
    assert found.dtype == inputs.dtype
    # A product may cancel to nothing, and a level too: what is rounded is a level and, at 4 bits, where all integers
    # are taken and the grid cannot be moved to its zero point, up to 8 steps.
    rounded = [weight.dequantize().abs() + 4 * per_column(weight.scale, group_size, in_features) for weight in weights]
    assert (
        (found - expected).abs() <= TOLERANCE * (inputs.double().abs() @ torch.cat(rounded).double().T) + 1e-9
    ).all()


def test_projections_know_what_they_take() -> None:
    group = FusedLinears([PackedLinear.from_quantized(random_weight(16, 64, 16, (2,)), None)])
    assert not group.supports(torch.bfloat16, 1)  # the operator has no groups of 16
    group = FusedLinears([PackedLinear.from_quantized(random_weight(16, 64, 32, (2,)), None)])
    assert group.supports(torch.bfloat16, 1)
    assert not group.supports(torch.float32, 1)
    assert not group.supports(torch.bfloat16, 0)
    assert not group.supports(torch.bfloat16, MAX_ROWS)
