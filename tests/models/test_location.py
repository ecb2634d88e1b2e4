"""Where a model lies: a folder, a package, or a hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.models.location import resolve_model_folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_model_folder_resolution(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_folder(str(model_folder)) == str(model_folder)
    assert resolve_model_folder("org/name") == "org/name"
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert resolve_model_folder("~/model") == str(model_folder)
