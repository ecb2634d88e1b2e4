"""What a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.pipeline.prepare import _pinned_source
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir.directory import RunDirectory


def test_a_run_stays_at_the_commit_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimplus.models.loading.ModelSource.pinned", lambda source: source)
    folder = RunDirectory(tmp_path)
    folder.open()
    recipe = ("recipe=llama7b_2bit", "model.path=org/name")
    assert _pinned_source(load_recipe(recipe), folder).revision is None
    folder.write("fingerprint.json", {"model.path": "org/name@a1"})
    assert _pinned_source(load_recipe(recipe), folder).revision == "a1"
    assert _pinned_source(load_recipe([*recipe, "model.revision=v2"]), folder).revision == "v2"
    assert _pinned_source(load_recipe([recipe[0], "model.path=org/other"]), folder).revision is None
