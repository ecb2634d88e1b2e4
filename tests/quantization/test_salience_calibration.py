"""Salience-weighted quantizer calibration of a group."""

from __future__ import annotations

import pytest
import torch

from slimplus.quantization import salience_calibration as calibration
from slimplus.quantization.salience_calibration import CalibrationConfig, calibrate_group


def test_larger_weight_of_salient_elements_moves_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(32, 64, generator=generator)
    salience = tile.square()
    plain, _ = calibrate_group(tile, salience, 2)
    weighted, _ = calibrate_group(tile, salience, 2, CalibrationConfig(salient_weight=50.0))
    assert weighted.mean() > plain.mean()  # the salient ones here are the largest: they ask for a wider range


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ranges_tried_together_are_those_tried_one_by_one(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    tile = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = calibrate_group(tile, tile.square(), bits)
    for at_once in (7, 101):
        monkeypatch.setattr(calibration, "_ranges_at_once", lambda _, count=at_once: count)
        assert all(map(torch.equal, calibrate_group(tile, tile.square(), bits), expected))
