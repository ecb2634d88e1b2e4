"""`slimplus report`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimplus.cli.main import main
from tests.support.light import PYTHON, environment, link_libraries
from tests.support.processes import ROOT


def test_one_run_gets_its_page_beside_the_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == before


def test_several_runs_are_compared_in_this_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(finished), str(finished)]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert "Side by side" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is no run directory: metrics.json is missing; give the run_dir of a run"),
        (["RUN", "--output", "/"], "--output: / is a folder; give a file"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(word.replace("RUN", str(finished)) for word in words)]) == 2
    assert capsys.readouterr().err == f"{sentence}\n"


def test_pytorch_is_not_needed(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from slimplus.cli.main import main; "
        f"status = main(['report', {str(finished)!r}, '--output', {str(tmp_path / 'page.html')!r}]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=True)


@pytest.mark.slow
def test_an_installation_without_plotly_names_what_is_missing(finished: Path, tmp_path: Path) -> None:
    link_libraries(tmp_path / "libraries")
    (tmp_path / "libraries" / "slimplus").symlink_to(ROOT / "slimplus")
    code = f"import sys; from slimplus.cli.main import main; sys.exit(main(['report', {str(finished)!r}]))"
    process = subprocess.run(
        [*PYTHON, "-c", code], env=environment(tmp_path / "libraries"), capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "slimplus report needs plotly, which is not installed: pip install plotly" in process.stderr
