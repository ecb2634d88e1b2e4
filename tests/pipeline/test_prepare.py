"""What a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.distributed.strategies import launch
from slimplus.pipeline.prepare import _begun_with, _block_runner, _pinned_source
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir.directory import RunDirectory
from tests.support.blocks import Emulation


def test_a_run_stays_at_the_commit_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimplus.models.loading.ModelSource.pinned", lambda source: source)
    folder = RunDirectory(tmp_path)
    folder.open()
    assert _begun_with(folder) == {}
    recipe = ("recipe=llama7b_2bit", "model.path=org/name")
    assert _pinned_source(load_recipe(recipe), "").revision is None
    folder.write("fingerprint.json", {"model.path": "org/name@a1"})
    before = _begun_with(folder)["model.path"]
    assert _pinned_source(load_recipe(recipe), before).revision == "a1"
    assert _pinned_source(load_recipe([*recipe, "model.revision=v2"]), before).revision == "v2"
    assert _pinned_source(load_recipe([recipe[0], "model.path=org/other"]), before).revision is None


def test_auto_keeps_the_precision_that_a_run_began_with(emulate: Emulation) -> None:
    """The same command goes on where another one is faster; a precision that is given counts."""
    emulate(8.0)
    fabric, recipe = launch("cpu", 1, 1, "auto"), load_recipe(("recipe=llama7b_2bit",))
    assert _block_runner(recipe, fabric, None).precision == "32-true"
    assert _block_runner(recipe, fabric, "bf16-mixed").precision == "bf16-mixed"
    given = load_recipe(("recipe=llama7b_2bit", "trainer.precision=16-mixed"))
    assert _block_runner(given, fabric, "bf16-mixed").precision == "16-mixed"
