"""Tiny random models and a text, so that the whole job runs in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network, and must not wait for one

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import AutoTokenizer

import slimplus
from slimplus.models import precision
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockInputs, StreamedModel
from slimplus.utils import cpu_speed
from tests.support.blocks import RUNNER, Emulation
from tests.support.models import ModelMaker, save_tiny_model
from tests.support.processes import ROOT
from tests.support.recipes import SMALL, Arguments
from tests.support.runs import run

settings.register_profile("slimplus", deadline=None)  # timings decide no test
settings.load_profile("slimplus")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`make_model(model_type, blocks=2)` → folder with a random model and a byte-level tokenizer, made once."""
    made: dict[tuple[str, int, tuple[tuple[str, int], ...]], Path] = {}

    def make(model_type: str, blocks: int = 2, **sizes: int) -> Path:
        key = (model_type, blocks, tuple(sorted(sizes.items())))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(f"tiny-{model_type}"), model_type, blocks, sizes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 60 KB, from Python's own documentation."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:60_000])
    return file


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """`emulate(8.0)`: the CPU multiplies 16-bit numbers 8 times slower than float32."""

    def measured(slowness: float) -> None:
        for module in (precision, cpu_speed):
            monkeypatch.setattr(module, "product_seconds", lambda dtype: 1.0 if dtype == torch.float32 else slowness)

    return measured


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three windows."""
    return torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def block_and_inputs(make_model: ModelMaker) -> tuple[nn.Module, BlockInputs]:
    """The first block of a tiny model, and the inputs of every block for eight windows."""
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), RUNNER)
    tokens = torch.randint(1, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    return streamed.blocks[0], streamed.block_inputs(tokens)


@pytest.fixture(scope="session")
def arguments(make_model: ModelMaker, text_file: Path) -> Arguments:
    """`arguments(run_dir, *overrides)` of a small run."""

    def build(run_dir: Path, *overrides: str, model: Path | None = None) -> list[str]:
        return [
            "recipe=smollm2_135m_2bit",
            f"model.path={model or make_model('llama')}",
            f"data.calibration.path={text_file}",
            f"data.evaluation.path={text_file}",
            *SMALL,
            f"run_dir={run_dir}",
            *overrides,
        ]

    return build


@pytest.fixture(scope="session")
def finished(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished `slimllm_plus` run; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("run") / "plus"
    run(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def packed(finished: Path) -> Path:
    """Its packed checkpoint."""
    return finished / "packed"


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    """The model it holds."""
    return slimplus.load(packed, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(packed: Path) -> Any:
    """The tokenizer beside it."""
    return AutoTokenizer.from_pretrained(packed)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves a build folder that would go into the next wheel."""
    source, built = tmp_path_factory.mktemp("source") / "slimplus", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    (source / "kernels/configs").mkdir(exist_ok=True)
    (source / "kernels/configs/gpu.json").write_text("{}")  # as `python -m slimplus.kernels.tune` leaves one behind
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    subprocess.run(build, cwd=source, capture_output=True, check=True)
    (file,) = built.glob("slimplus-*.whl")
    return file
