"""Programs of a compiled kernel that a GPU runs at the same time.

The limits are those of the table "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming
Guide, the arithmetic that of its header `cuda_occupancy.h`. https://docs.nvidia.com/cuda/cuda-c-programming-guide
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
_PARTITIONS, _PARTITION_REGISTERS, _REGISTER_UNIT = 4, 16_384, 256  # a warp's registers lie in one partition
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024  # bytes; the system keeps the reserved ones for each program


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at most.

    Attributes:
        warps: warps.
        programs: programs, which CUDA calls blocks.
        shared: shared memory, in bytes.
    """

    warps: int
    programs: int
    shared: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: registers of a thread.
        shared: shared memory of a program, in bytes.
        num_warps: warps of a program.
    """

    registers: int
    shared: int
    num_warps: int


_SMALL = Limits(48, 24, 100 * 1024)
LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    87: Limits(48, 16, 164 * 1024),
    89: _SMALL,
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    103: Limits(64, 32, 228 * 1024),
    120: _SMALL,
    121: _SMALL,
}
"""Limits by compute capability, 90 for 9.0; others get those of 8.6, the smallest."""


def resident_programs(capability: int, resources: Resources) -> int:
    """Return how many programs of a kernel a multiprocessor runs at the same time; 0 if not even one fits.

    Args:
        capability: compute capability of the GPU, 90 for 9.0.
        resources: what the compiled kernel takes.
    """
    limits = LIMITS.get(capability, LIMITS[86])
    registers = _round_up(resources.registers * WARP, _REGISTER_UNIT)
    warps = min(limits.warps, _PARTITIONS * (_PARTITION_REGISTERS // registers))
    shared = _round_up(resources.shared + _SHARED_RESERVED, _SHARED_UNIT)
    return min(warps // resources.num_warps, limits.shared // shared, limits.programs)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
