"""Programs that run at the same time, against what NVIDIA's occupancy calculator says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimplus.kernels.occupancy import LIMITS, Resources, resident_programs


@pytest.mark.parametrize(
    ("capability", "resources", "programs"),
    [
        (90, Resources(125, 12_928, 2), 8),
        (90, Resources(158, 17_024, 2), 6),
        (90, Resources(137, 12_928, 2), 6),  # 14 warps by their number alone, but a partition holds 3
        (90, Resources(255, 57_344, 4), 2),
        (90, Resources(32, 0, 4), 16),  # of 64 warps
        (90, Resources(16, 0, 1), 32),  # no more programs
        (80, Resources(96, 41_088, 4), 3),  # by shared memory: 164 KiB less 1 KiB a program
        (89, Resources(64, 21_120, 2), 4),
        (89, Resources(64, 0, 2), 16),
        (75, Resources(32, 0, 4), 12),
        (90, Resources(128, 228 * 1024, 4), 0),
    ],
)
def test_programs_of_a_multiprocessor(capability: int, resources: Resources, programs: int) -> None:
    assert resident_programs(capability, resources) == programs


@given(st.sampled_from(sorted(LIMITS)), st.integers(16, 255), st.integers(0, 99_000), st.sampled_from((1, 2, 4, 8)))
def test_nothing_is_taken_twice(capability: int, registers: int, shared: int, num_warps: int) -> None:
    found = resident_programs(capability, Resources(registers, shared, num_warps))
    limits = LIMITS[capability]
    assert found * num_warps <= limits.warps
    assert found * num_warps * 32 * registers <= 65_536
    assert found * (shared + 1024) <= limits.shared
    assert found <= resident_programs(capability, Resources(max(16, registers - 8), shared, num_warps))
