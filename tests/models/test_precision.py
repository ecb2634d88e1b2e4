"""The precision that a device is fast in."""

from __future__ import annotations

import pytest
import torch

from slimplus.models.precision import resolve_precision
from tests.support.blocks import CPU


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_precision_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("16-mixed", CPU) == "16-mixed"
