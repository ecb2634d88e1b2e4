"""What a measurement was made on: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("slimplus", "torch", "transformers", "triton")
CPUINFO, STATM, GPUS = Path("/proc/cpuinfo"), Path("/proc/self/statm"), Path("/proc/driver/nvidia/gpus")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, GPUs, Python, versions of the packages that matter, the commit; None for what is not known."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None where there is no checkout."""
    if not (CHECKOUT / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def resident_bytes() -> int | None:
    """Memory that this process has in RAM now, or None where the system does not tell."""
    if not STATM.exists():
        return None
    _size, resident, *_ = STATM.read_text().split()
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Most memory that this process has had in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _processor() -> str:
    model = re.search(r"^model name\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Models, as NVIDIA's driver for Linux tells them; no library of CUDA is loaded for it."""
    told = [file.read_text() for file in sorted(GPUS.glob("*/information"))]
    return [model[1] for text in told if (model := re.search(r"^Model:\s*(.*)$", text, re.MULTILINE))]


def package_version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # such as Triton, where there is no Linux
        return None
