"""The machine, the versions and the commit that a measurement was made with, and the memory in use."""

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
CPUINFO, MEMINFO, STATM = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/proc/self/statm")
GPUS = Path("/proc/driver/nvidia/gpus")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, GPUs, versions of Python and of `PACKAGES`, and the commit; None for unknown values."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the checkout's commit, with `-dirty` if files differ from it, or None outside a checkout."""
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
    """Return the RAM that this process occupies at the moment, or None on systems without /proc."""
    if not STATM.exists():
        return None
    _size, resident, *_ = STATM.read_text().split()
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Return the RAM that new work may still occupy, or None on systems without /proc."""
    available = (
        re.search(r"^MemAvailable:\s*(\d+) kB$", MEMINFO.read_text(), re.MULTILINE) if MEMINFO.exists() else None
    )
    return int(available[1]) * 1024 if available else None


def peak_resident_bytes() -> int:
    """Return the most RAM that this process has occupied so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _processor() -> str:
    """Return the processor's model name, or its architecture if the system does not tell the name."""
    model = re.search(r"^model name\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Return the models of the NVIDIA GPUs, read from the Linux driver's files so that CUDA need not be loaded."""
    texts = [file.read_text() for file in sorted(GPUS.glob("*/information"))]
    return [model[1] for text in texts if (model := re.search(r"^Model:\s*(.*)$", text, re.MULTILINE))]


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Triton, for example, exists for Linux only
        return None
