"""How fast this machine's CPU multiplies matrices of each dtype, measured."""

from __future__ import annotations

import time
from functools import cache

import torch

SIDE = 256
FEWEST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 3, 20, 0.1
EMULATED = 2.0  # times float32's time: native bfloat16 takes less time than float32, emulated bfloat16 8 times as long


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """Return the seconds that one thread takes for a product of two matrices of 256 x 256: the least of several.

    The first call for a dtype takes a few milliseconds, or a tenth of a second where the CPU emulates the dtype.
    """
    matrix, threads = torch.ones(SIDE, SIDE, dtype=dtype, device="cpu"), torch.get_num_threads()
    seconds: list[float] = []
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other would be measured
    try:
        while len(seconds) < FEWEST_ROUNDS or (len(seconds) < MOST_ROUNDS and sum(seconds) < ENOUGH_SECONDS):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds)


@torch.compiler.assume_constant_result
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to multiply what is of `dtype`: float32 on a CPU that emulates `dtype`."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return torch.float32 if product_seconds(dtype) > EMULATED * product_seconds(torch.float32) else dtype
