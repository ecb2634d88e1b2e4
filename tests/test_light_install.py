"""Beside torch, transformers and safetensors alone the package loads and generates; training says what it lacks."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from slimplus.hub import checkpoint
from slimplus.utils.errors import InputError
from slimplus.utils.requirements import QUANTIZATION, check_installed
from tests.support.light import PYTHON, TRAINING, distributions, environment, link_libraries
from tests.support.models import expected_text
from tests.support.processes import CONSOLE, ROOT

PROMPT = "Functions are"
MISSING = (
    "datasets, lightning, plotly, tensorboard and torchmetrics, which are not installed: "
    "pip install datasets lightning plotly"
)

LOAD = """
import json, sys
import slimplus
from transformers import AutoModelForCausalLM, AutoTokenizer

path, prompt = sys.argv[1:]
tokenizer, texts = AutoTokenizer.from_pretrained(path), []
for model in (slimplus.load(path, dtype="float32"), AutoModelForCausalLM.from_pretrained(path, dtype="float32")):
    assert type(model.model.layers[0].mlp.up_proj) is slimplus.PackedLinear
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, pad_token_id=0, max_new_tokens=8, do_sample=False)
    texts.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
loaded = sorted({name.partition(".")[0] for name in sys.modules})
sys.stdout.write(json.dumps({"texts": texts, "loaded": loaded}))
"""

QUANTIZE = """
import sys, torch, slimplus
layer = slimplus.quantize_linear(torch.nn.Linear(64, 32), torch.randn(100, 64), group_size=16)
assert layer(torch.ones(1, 64)).shape == (1, 32)
assert not {"transformers", *sys.argv[1:]} & {*sys.modules}
try:
    slimplus.quantize(recipe="smollm2_135m_2bit")
except slimplus.InputError as error:
    sys.stdout.write(str(error))
"""


def run(*command: str | Path, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process


def check_loaded(process: subprocess.CompletedProcess[str], model: Any, tokenizer: Any) -> None:
    """It wrote what the model writes here, and imported nothing of training."""
    said = json.loads(process.stdout)
    expected = expected_text(model, tokenizer, PROMPT, max_new_tokens=8, do_sample=False)
    assert said["texts"] == [expected, expected]
    assert {"slimplus", "torch", "transformers"} <= set(said["loaded"])
    assert not set(TRAINING) & set(said["loaded"])


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the allowed libraries and this checkout's package."""
    folder = tmp_path_factory.mktemp("light")
    link_libraries(folder)
    (folder / "slimplus").symlink_to(ROOT / "slimplus")
    return folder


def test_the_environment_is_as_empty_as_it_claims() -> None:
    assert {"torch", "transformers", "safetensors", "tokenizers", "numpy"} <= set(distributions())
    assert not {"lightning", "deepspeed", "datasets", "torchmetrics", "bitsandbytes", "tensorboard", "wrapt"} & set(
        distributions()
    )


def test_a_packed_checkpoint_loads_and_generates(libraries: Path, packed: Path, model: Any, tokenizer: Any) -> None:
    check_loaded(run(*PYTHON, "-c", LOAD, packed, PROMPT, folder=libraries), model, tokenizer)


def test_training_names_what_it_lacks(libraries: Path) -> None:
    process = run(*PYTHON, *CONSOLE, "train", "recipe=smollm2_135m_2bit", folder=libraries, status=2)
    assert process.stderr.startswith(f"slimplus train needs {MISSING}")
    assert len(process.stderr.splitlines()) == 1
    process = run(*PYTHON, ROOT / "train.py", "recipe=smollm2_135m_2bit", folder=libraries, status=2)
    assert process.stderr.startswith(f"slimplus train needs {MISSING}")


def test_a_layer_can_be_quantized(libraries: Path) -> None:
    process = run(*PYTHON, "-c", QUANTIZE, *TRAINING, folder=libraries)
    assert process.stdout.startswith(f"slimplus.quantize needs {MISSING}")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "generate", "benchmark"])
def test_the_commands_work(libraries: Path, packed: Path, command: str) -> None:
    options = {
        "inspect": [],
        "generate": [PROMPT, "--max-new-tokens", "4"],
        "benchmark": ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1"],
    }
    process = run(*PYTHON, *CONSOLE, command, packed, *options[command], folder=libraries)
    assert process.stdout.strip()


@pytest.mark.slow
def test_a_wheel_installed_without_its_dependencies_works(
    libraries: Path, wheel: Path, packed: Path, tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    """A real virtual environment: pip puts the wheel there, a path file the libraries."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python3.*/site-packages")
    others = tmp_path / "libraries"
    link_libraries(others)
    (site / "libraries.pth").write_text(f"{others}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=300)
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    check_loaded(run(python, "-c", LOAD, packed, PROMPT, folder=nowhere), model, tokenizer)
    process = run(folder / "bin/slimplus", "inspect", packed, folder=nowhere)
    assert "average bits" in process.stdout
    process = run(folder / "bin/slimplus", "train", "--help", folder=nowhere, status=2)
    assert process.stderr.startswith(f"slimplus train needs {MISSING}")


def test_what_a_run_imports_are_dependencies_of_the_package() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    assert set(QUANTIZATION.values()) <= names
    assert set(project["optional-dependencies"]) == {"bench", "docs", "serve", "tasks", "test"}


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ({"nothing_here": "nothing"}, "It needs nothing, which is not installed: pip install nothing"),
        (
            {"nothing_here": "nothing", "json": "json", "nor_here": "nor"},
            "It needs nothing and nor, which are not installed: pip install nothing nor",
        ),
    ],
)
def test_a_missing_library_is_one_sentence(modules: dict[str, str], sentence: str) -> None:
    check_installed("It", {"json": "json"})
    with pytest.raises(InputError) as caught:
        check_installed("It", modules)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("device_map", "device"),
    [("cpu", "cpu"), (torch.device("cpu"), "cpu"), ("cuda:1", "cuda:1"), (0, "cuda:0"), ("auto", None), (None, None)],
)
def test_one_device_is_told_from_several(device_map: Any, device: str | None) -> None:
    if isinstance(device_map, int) and not torch.cuda.is_available():
        pytest.skip("a number is that of a GPU")
    assert checkpoint._only_device(device_map) == (device and torch.device(device))
    assert checkpoint._only_device({"": "cpu"}) is None


def test_one_device_needs_no_accelerate(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoint, "transformers.integrations.accelerate"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.is_accelerate_available", lambda: False)
    assert checkpoint.load(packed, device_map="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="pip install accelerate"):
        checkpoint.load(packed, device_map="auto")
