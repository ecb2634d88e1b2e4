"""How fast this machine's CPU multiplies matrices of each dtype, measured."""

from __future__ import annotations

import time
from functools import cache

import torch

SIDE, ROUNDS = 256, 5
EMULATED = 2.0  # times float32's time: native bfloat16 takes less time than float32, emulated bfloat16 8 times as long


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """Return the seconds that a product of two square matrices of side 256 takes on the CPU: the least of five.

    The first call for a dtype takes a few milliseconds, or a tenth of a second where the CPU emulates the dtype.
    """
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device="cpu")
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.compiler.assume_constant_result
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to multiply what is of `dtype`: float32 on a CPU that emulates `dtype`."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return torch.float32 if product_seconds(dtype) > EMULATED * product_seconds(torch.float32) else dtype
