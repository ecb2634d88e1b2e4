"""The dtype that a CPU multiplies in."""

from __future__ import annotations

import pytest
import torch

from slimplus.utils.cpu_speed import product_dtype, product_seconds
from tests.support.blocks import CPU, Emulation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_cpu_emulates_is_multiplied_in_float32(emulate: Emulation, dtype: torch.dtype) -> None:
    emulate(8.0)
    assert product_dtype(dtype, CPU) == torch.float32
    assert product_dtype(dtype, torch.device("cuda")) == dtype
    emulate(0.3)
    assert product_dtype(dtype, CPU) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_stay(emulate: Emulation, dtype: torch.dtype) -> None:
    emulate(8.0)
    assert product_dtype(dtype, CPU) == dtype


def test_a_product_is_measured_once() -> None:
    seconds = product_seconds(torch.float32)
    assert 0 < seconds < 1
    assert product_seconds(torch.float32) == seconds
