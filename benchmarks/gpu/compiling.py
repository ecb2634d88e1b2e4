"""Every kernel that later phases launch, compiled in parallel into Triton's cache, and what the compiler made of it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.correctness import launches as checked_launches
from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import layers, mixes
from benchmarks.kernels import GROUP_SIZE
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import BUCKETS, LaunchConfig, default_launch
from slimplus.kernels.occupancy import Resources, resident_programs
from slimplus.kernels.tune import tiles

TUNED_MIX = "2 (1/2/3)"
Kernel = tuple[FusedShape, str, str, LaunchConfig]
"""Shape, dtype of the inputs, dtype of the scales, and launch; both dtypes by their names."""


def run(visit: Visit, rows: Rows) -> None:
    """Compile all kernels, as many at once as there are cores."""
    workers = 1 if visit.rehearsal else os.cpu_count() or 1
    interpreted = os.environ.pop("TRITON_INTERPRET", None)  # the workers are to compile
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            pending = {_name(kernel): pool.submit(compile_one, visit.capability, kernel) for kernel in kernels(visit)}
            try:
                for name, future in pending.items():
                    rows.measure({"kernel": name}, partial(_result, future, rows.deadline))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def _result(future: Future[dict[str, Any]], deadline: float) -> dict[str, Any]:
    return future.result(timeout=max(1.0, deadline - time.monotonic()))


def kernels(visit: Visit) -> Iterator[Kernel]:
    """Yield the kernels of this visit without repetitions: the defaults first, then checked ones, then candidates."""
    seen = set()
    for shape, dtype, scale_dtype, launch in _wanted(visit):
        # What differs in a number alone that the kernel does not know at compile time is the same kernel.
        key = (len(shape.out_features), shape.widths, shape.group_size, _aligned(shape), dtype, scale_dtype, launch)
        if key not in seen:
            seen.add(key)
            yield shape, dtype, scale_dtype, launch


def _wanted(visit: Visit) -> Iterator[Kernel]:
    bfloat16, float16 = "bfloat16", "float16"
    for layer in layers(visit)[: 1 if visit.rehearsal else None]:
        for widths in mixes(visit).values():
            for tokens in (8,) if visit.rehearsal else BUCKETS:
                launch = default_launch(visit.capability, GROUP_SIZE, tokens)
                yield layer.shape(widths), bfloat16, float16, launch
    if visit.rehearsal:
        return
    yield from checked_launches(visit)
    for layer in layers(visit):
        for tokens in BUCKETS:
            for tile in tiles(tokens):
                yield layer.shape(mixes(visit)[TUNED_MIX]), bfloat16, float16, tile


def _aligned(shape: FusedShape) -> tuple[bool, ...]:
    """Return which sizes are multiples of 16, for which Triton compiles a kernel of their own."""
    ragged = shape.in_features % shape.group_size != 0
    return (ragged, *(size % 16 == 0 for size in (shape.in_features, shape.columns, shape.padded_columns)))


def _name(kernel: Kernel) -> str:
    shape, dtype, scale_dtype, launch = kernel
    widths = "".join(map(str, shape.widths))
    tile = f"{launch.block_n}x{launch.block_m} w{launch.num_warps} s{launch.num_stages}"
    rows = "+".join(map(str, shape.out_features))
    return f"{rows}x{shape.in_features} g{shape.group_size} b{widths} {dtype} {scale_dtype} {tile}"


def compile_one(architecture: int, kernel: Kernel) -> dict[str, Any]:
    """Compile one kernel for an architecture, in a process of its own, and return what it takes."""
    from benchmarks.gpu.machine_code import compiling_for, disassemble
    from slimplus.kernels.packed_matmul import compile_kernel

    shape, dtype, scale_dtype, launch = kernel
    start = time.perf_counter()
    with compiling_for(architecture):
        compiled = compile_kernel(shape, getattr(torch, dtype), getattr(torch, scale_dtype), False, launch)
    seconds = time.perf_counter() - start
    code = disassemble(compiled)
    resources = Resources(code.registers, code.shared, launch.num_warps)
    weights = launch.block_n * shape.group_size / (32 * launch.num_warps)  # of a thread, in one pass of a loop
    return {
        "architecture": architecture,
        "launch": asdict(launch),
        "registers": code.registers,
        "stack": code.stack,
        "local": code.local,
        "spills": code.spills,
        "shared": code.shared,
        "resident": resident_programs(architecture, resources),
        "instructions_per_weight": [len(loop) / weights for loop in code.product_loops()],
        "seconds": seconds,
    }
