"""Bits allocated over blocks and the whole model by measured sensitivity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimplus.distributed.preemption import Preemption
from slimplus.pipeline.prepare import prepare, start
from slimplus.pipeline.stages import sensitivity
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import measured_run, packed_weights


@pytest.mark.parametrize("allocation", ["uniform", "block", "model"])
def test_every_allocation_meets_the_average(arguments: Arguments, tmp_path: Path, allocation: str) -> None:
    metrics = measured_run(arguments(tmp_path, "quantization.method=slimllm", f"quantization.allocation={allocation}"))
    assert metrics["average_bits"] == 2.0
    widths = json.loads((tmp_path / "allocation.json").read_text())["bits"]
    mixed = {width for layer in widths.values() for width in layer} != {2}
    assert mixed == (allocation != "uniform")


def test_the_models_allocation_differs_between_blocks(tuned: Path) -> None:
    widths = json.loads((tuned / "allocation.json").read_text())["bits"]
    per_block = [[sum(w) for name, w in widths.items() if f"layers.{index}." in name] for index in (0, 1)]
    assert per_block[0] != per_block[1]


def test_a_budget_in_bytes_is_kept(arguments: Arguments, tmp_path: Path) -> None:
    keys = ("quantization.method=rtn", "quantization.allocation=model")
    metrics = measured_run(arguments(tmp_path, *keys, "quantization.size_bytes=44000"))
    packed = [t.nbytes for name, t in packed_weights(tmp_path).items() if "proj" in name]
    assert 0.97 * 44000 < sum(packed) <= 44000
    assert metrics["allocation_gap"] >= 0
    with pytest.raises(InputError, match="quantization.size_bytes: .* the budget is 4,400 bytes; give more"):
        measured_run(arguments(tmp_path / "small", *keys, "quantization.size_bytes=4400"))


def test_sensitivity_falls_with_the_width_in_every_layer(arguments: Arguments, tmp_path: Path) -> None:
    recipe = load_recipe(
        arguments(tmp_path, "quantization.allocation=model", "quantization.widths=[1,2,6]", "data.samples=64")
    )
    preemption = Preemption()
    job = prepare(recipe, start(recipe), preemption)
    tables = sensitivity._measure(job)
    assert tables["channels"].shape == (2, 64)
    layers = {name: table for name, table in tables.items() if name != "channels"}
    assert len(layers) == 14
    for table in layers.values():
        assert (table[0] > table[2]).all()
        assert (table >= 0).all()
