"""The precision that a device is fast in."""

from __future__ import annotations

import pytest

from slimplus.models.precision import resolve_precision
from tests.support.blocks import CPU, Emulation


@pytest.mark.parametrize(("slowness", "expected"), [(0.3, "bf16-mixed"), (0.9, "32-true"), (8.0, "32-true")])
def test_auto_precision_is_the_faster_one(emulate: Emulation, slowness: float, expected: str) -> None:
    emulate(slowness)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("16-mixed", CPU) == "16-mixed"
