"""The manifest names every complete file, and a kill at any moment leaves the old or the new."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.utils.files import clean, staging_folder
from slimplus.utils.manifest import Manifest


def test_every_complete_file_is_named(finished: Path) -> None:
    manifest = Manifest(finished)
    named = {str(path.relative_to(finished)) for path in manifest.named()}
    found = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert named == found - {"manifest.json", ".lock", "progress.json", "report.html"}
    assert all(manifest.problem(path) is None for path in manifest.named())


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, folder: bool
) -> None:
    """Every step that changes a name is a rename: stop before each of them in turn."""
    manifest, path = Manifest(tmp_path), tmp_path / "thing"

    def put(content: str) -> None:
        if folder:
            staging = staging_folder(path)
            staging.mkdir(exist_ok=True)
            (staging / "file").write_text(content)
            manifest.replace_folder(path)
        else:
            manifest.write(path, content)

    put("old")
    renames = 0

    class Killed(RuntimeError):
        pass

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            if renames == moment:
                raise Killed
            renames += 1
            return original(self, target)

        monkeypatch.setattr(Path, name, rename)

    counted("rename")
    counted("replace")
    try:
        put("new")
    except Killed:
        pass
    else:
        assert moment >= 3
    monkeypatch.undo()
    clean(tmp_path)
    assert Manifest(tmp_path).problem(path) is None
    assert (path / "file" if folder else path).read_text() in ("old", "new")
    assert not list(tmp_path.rglob(".*"))
