"""slimplus check tells what a model is, and ends with status 2 if anything is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slimplus.cli.main import main
from tests.support.models import ModelMaker


def test_a_sound_model(make_model: ModelMaker, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(make_model("qwen2"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "architecture  qwen2" in lines
    assert any(line.startswith("packed        14 linear layers, 99") for line in lines)
    assert lines[-1] == "no problems found"


def test_a_model_that_is_another_than_its_configuration_says(
    make_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 257', '"vocab_size": 256'))
    assert main(["check", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(
        f"{folder}: model.embed_tokens.weight has the shape [257, 64] in the file and [256, 64] by config.json"
    )
    assert "blocks        2" in said.out
    assert "no problems" not in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["./nowhere"], "./nowhere does not exist; give a folder, a hub id org/name or package:NAME"),
        (["MODEL", "--gguf-file", "x.gguf"], "--gguf-file: x.gguf is not in MODEL; it holds no GGUF file"),
    ],
)
def test_what_is_no_model(
    make_model: ModelMaker, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    model = str(make_model("llama"))
    assert main(["check", *(word.replace("MODEL", model) for word in words)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == said.replace("MODEL", model)
