"""Packed checkpoints to change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import ModelMaker
from tests.support.runs import run
from tests.support.vllm_stand_ins import import_plugin


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from import_plugin(monkeypatch)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.fixture(scope="session")
def checkpoint(make_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed checkpoint."""
    folder = tmp_path_factory.mktemp("security")
    arguments = [
        "recipe=smollm2_135m_2bit",
        f"model.path={make_model('llama')}",
        *("model.gguf_file=null", "model.dtype=auto", "trainer.precision=32-true", "trainer.accelerator=cpu"),
        *(f"data.{kind}.path={text_file}" for kind in ("calibration", "evaluation")),
        *("data.samples=2", "data.sequence_length=16", "data.evaluation.sequence_length=16"),
        *("data.evaluation.windows=1", "quantization.group_size=16", "quantization.method=slimllm"),
        *("quantization.allocation=null", "end_to_end.epochs=0"),
        f"run_dir={folder}",
    ]
    run(arguments)
    return folder / "packed"
