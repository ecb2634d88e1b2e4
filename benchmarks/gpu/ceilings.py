"""What the GPU reaches at best: bytes and operations a second, and the seconds of launches that do nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from benchmarks.gpu.machine import Visit, spread
from benchmarks.gpu.rows import Rows

BYTES, REHEARSED_BYTES = 1 << 30, 1 << 12
SIDE, REHEARSED_SIDE = 8192, 32
CHAIN = 100  # launches that follow each other in one graph
BLOCK = 4096


@triton.jit
def _copy_kernel(source, target, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def _read_kernel(source, target, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + place, mask=place < size, other=0))
    if total == 1 << 30:  # the compiler cannot know that it never is
        tl.store(target, total)


@triton.jit
def _empty_kernel(target, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def run(visit: Visit, rows: Rows) -> None:
    """Measure the ceilings of a GPU."""
    size = REHEARSED_BYTES if visit.rehearsal else BYTES
    source = torch.randint(8, (size // 4,), dtype=torch.int32, device=visit.device)
    target = torch.empty_like(source)
    grid = (triton.cdiv(size // 4, BLOCK),)
    side = REHEARSED_SIDE if visit.rehearsal else SIDE
    left, right = (torch.randn(side, side, device=visit.device).bfloat16() for _ in range(2))
    small = torch.zeros(1024, dtype=torch.int32, device=visit.device)

    def empty(pdl: bool) -> Callable[[], Any]:
        options = {"launch_pdl": True} if pdl and not visit.rehearsal else {}
        return lambda: _empty_kernel[visit.multiprocessors,](small, PDL=bool(options), **options)

    moved: dict[str, tuple[Callable[[], Any], int]] = {
        "memcpy": (lambda: target.copy_(source), 2 * size),
        "triton copy": (lambda: _copy_kernel[grid](source, target, size // 4, BLOCK), 2 * size),
        "triton read": (lambda: _read_kernel[grid](source, target, size // 4, BLOCK), size),
    }
    for name, (call, count) in moved.items():
        rows.measure({"what": name}, partial(_rate, visit, call, count, "bytes"))
    rows.measure({"what": "memcpy, no graph"}, lambda: _rate(visit, moved["memcpy"][0], 2 * size, "bytes", graph=False))
    operations = 2 * side**3
    rows.measure({"what": f"product of {side}"}, lambda: _rate(visit, lambda: left @ right, operations, "operations"))
    chained: dict[str, Callable[[], Any]] = {"empty kernel": empty(False), "memset of 4 KiB": small.zero_}
    if visit.capability >= 90:
        chained["empty kernel, dependent launch"] = empty(True)
    for name, call in chained.items():
        rows.measure({"what": name}, partial(_chain, visit, call))


def _rate(visit: Visit, call: Callable[[], Tensor], count: int, unit: str, graph: bool = True) -> dict[str, Any]:
    """Return the times of a call, and how many bytes or operations it does a second."""
    seconds = spread(visit.times([call]) if graph else _event_times(visit, call))
    return {"seconds": seconds, f"{unit}_per_second": count / seconds["median"]}


def _chain(visit: Visit, call: Callable[[], Any]) -> dict[str, Any]:
    """Return the times of a call among many that follow each other."""
    return {"seconds": spread(visit.times([call] * (2 if visit.rehearsal else CHAIN)))}


def _event_times(visit: Visit, call: Callable[[], Any]) -> list[float]:
    """Return the seconds of a call that is launched by itself."""
    if visit.rehearsal:
        return visit.times([call])
    call()
    seconds = []
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000)
    return seconds


def read_ceilings(visit: Visit) -> dict[str, float]:
    """Return the bytes a second that this GPU reached, by the way it reached them; none before they were measured."""
    file = visit.folder / "ceilings.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return {row["what"]: row["bytes_per_second"] for row in rows if "bytes_per_second" in row}
