"""Writes that reach the disk before a name does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slimplus.utils import files
from slimplus.utils.files import replace_folder, staging_folder


def test_bytes_are_on_the_disk_before_a_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (staging := staging_folder(tmp_path / "thing")).mkdir()
    (staging / "file").write_text("x")
    replace_folder(tmp_path / "thing")
    assert [Path(call).name for call in calls] == ["file", staging.name, tmp_path.name]
