"""The GPU of a visit: what it is, what it compiles, and how calls on it are timed."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimplus.kernels.launch import LaunchConfig, blocks
from slimplus.kernels.measure import RandomWeights, graph_times
from slimplus.kernels.occupancy import Resources, resident_programs
from slimplus.kernels.packed_matmul import compile_kernel
from slimplus.utils.machine import describe_machine, package_version

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Visit:
    """The machine that is visited, and where its results go.

    Attributes:
        gpu: name of the GPU.
        device: the GPU, or the CPU of a rehearsal.
        capability: compute capability, 90 for 9.0.
        multiprocessors: multiprocessors of the GPU.
        folder: folder of the results.
        rehearsal: whether nothing is measured, only run.
    """

    gpu: str
    device: torch.device
    capability: int
    multiprocessors: int
    folder: Path
    rehearsal: bool

    def times(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Return seconds of a call, once for each repetition; all calls take turns, in a CUDA graph on a GPU."""
        if not self.rehearsal:
            return graph_times(calls)
        start = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - start) / len(calls)] * 2

    def describe(self) -> dict[str, Any]:
        """Return processor, GPU, versions, commit, and the clocks at this moment."""
        return describe_machine() | {
            "gpu": self.gpu,
            "capability": self.capability,
            "multiprocessors": self.multiprocessors,
            "gemlite": package_version("gemlite"),
            "vllm": package_version("vllm"),
            "clocks": _clocks(),
        }


def open_visit(output: Path, rehearsal: bool) -> Visit:
    """Return the visit of this machine's GPU, or the rehearsal on its CPU, whose results go below `output`."""
    if rehearsal:
        return Visit("rehearsal", torch.device("cpu"), 90, 1, output / "rehearsal", True)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_properties(device)
    folder = output / gpu.name.lower().replace(" ", "_")
    return Visit(gpu.name, device, 10 * gpu.major + gpu.minor, gpu.multi_processor_count, folder, False)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the 10th and the 90th percentile of some times."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "p10": tenths[0], "p90": tenths[-1]}


def launch_facts(visit: Visit, weights: RandomWeights, inputs: Tensor, launch: LaunchConfig) -> dict[str, Any]:
    """Return what a launch takes of the GPU.

    `slots` are the programs that run at the same time by the registers and shared memory of the compiled kernel, and
    `driver_resident` those that the driver tells for a multiprocessor.
    """
    programs = blocks(launch, weights.shape.out_features, len(inputs)) * launch.split_k
    facts: dict[str, Any] = {"launch": asdict(launch), "programs": programs}
    if visit.rehearsal:
        return facts | {"registers": None, "spills": None, "shared": None, "slots": 1, "driver_resident": None}
    kernel = compile_kernel(weights.shape, inputs.dtype, weights.fused["scales"].dtype, False, launch)
    kernel._init_handles()
    resources = Resources(kernel.n_regs, kernel.metadata.shared, launch.num_warps)
    return facts | {
        "registers": kernel.n_regs,
        "spills": kernel.n_spills,
        "shared": kernel.metadata.shared,
        "slots": visit.multiprocessors * resident_programs(visit.capability, resources),
        "driver_resident": _driver_resident(kernel.function, 32 * launch.num_warps, kernel.metadata.shared),
    }


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_resident(function: int, threads: int, shared: int) -> int | None:
    """Return how many programs of a loaded kernel fit a multiprocessor, as the CUDA driver tells; None if it does not.

    See `cuOccupancyMaxActiveBlocksPerMultiprocessor` of the CUDA driver API.
    """
    driver, found = _driver(), ctypes.c_int()
    if driver is None:
        return None
    arguments = (ctypes.byref(found), ctypes.c_void_p(function), ctypes.c_int(threads), ctypes.c_size_t(shared))
    failed = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(*arguments)
    return None if failed else found.value


def _clocks() -> Mapping[str, str]:
    """Return driver, clocks, temperature and power as nvidia-smi tells them; nothing is set."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(CLOCKS, (part.strip() for part in told[0].split(",")), strict=False)) if told else {}
