"""Every example runs as its header says, here on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import to_yaml
from tests.support.processes import ROOT
from tests.support.recipes import Arguments

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def recipe(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file: the tiny model without training, in place of the recipe that an example runs by default."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(to_yaml(load_recipe(arguments(Path("unused"), "quantization.method=gptq"))))
    return file


def run(folder: Path, name: str, *options: str | Path, said: str = "") -> str:
    """Runs an example in `folder`, with `said` as its standard input; returns what it writes."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_every_example_is_listed_and_tested() -> None:
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text())) == files
    assert all(f'"{name}"' in Path(__file__).read_text() for name in files)


@pytest.mark.slow
def test_quantize_and_chat(recipe: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "quantize_and_chat.py", "--recipe", recipe, "--max-new-tokens", "4", said="Hello\nAgain\n")
    assert re.search(r"packed: 0\.1 MB, \d\.\d\d times smaller than at 16 bit", said)
    assert re.search(r"perplexity \d+\.\d\d at full precision, \d+\.\d\d quantized", said)
    assert len(said.partition("Ctrl-D ends.\n")[2].splitlines()) >= 2
    assert (tmp_path / "runs/quantize_and_chat/packed/model.safetensors").is_file()


@pytest.mark.slow
def test_own_calibration_text(recipe: Path, text_file: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "own_calibration_text.py", text_file, "--recipe", recipe)
    assert f"on the last 10% of {text_file}" in said
    assert re.search(r"perplexity \d+\.\d\d at full precision, \d+\.\d\d quantized", said)
    parts = [(tmp_path / f"runs/own_calibration_text_text/{name}.txt") for name in ("calibration", "evaluation")]
    assert "".join(part.read_text() for part in parts) == text_file.read_text()


@pytest.mark.slow
def test_size_budget(recipe: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "size_budget.py", "0.035", "--recipe", recipe)
    assert re.search(r"^\d\.\d{3} bits on average, \d\.\d{3} with all that is stored$", said, re.MULTILINE)
    assert re.search(r"^[1-4] bits: +\d+ groups, +\d+%$", said, re.MULTILINE)
    metrics = json.loads((tmp_path / "runs/size_budget/metrics.json").read_text())
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert metrics["bits_per_weight"] * weights / 8 <= 35_000


@pytest.mark.slow
def test_several_gpus_on_cpus(recipe: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "several_gpus.py", "--recipe", recipe, "--accelerator", "cpu", "--devices", "2")
    assert len(re.findall(r"^perplexity \d+\.\d\d -> \d+\.\d\d, packed in", said, re.MULTILINE)) == 1


@pytest.mark.slow
def test_own_module(tmp_path: Path) -> None:
    said = run(tmp_path, "own_module.py")
    uniform, slimllm = (float(error) for error in re.findall(r"at 2 bits, \w+: relative error ([\d.]+)", said))
    assert slimllm < uniform
    assert "widths by salience: [" in said


def test_plot_allocation(finished: Path, tmp_path: Path) -> None:
    """Each code cell runs, and every figure that it shows is drawn."""
    notebook = json.loads((EXAMPLES / "plot_allocation.ipynb").read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run_dir = tmp_path / "runs/smollm2_135m_2bit"
    run_dir.mkdir(parents=True)
    shutil.copy(finished / "allocation.json", run_dir)
    (tmp_path / "cells.py").write_text(
        "\n".join([*cells, "for number in plt.get_fignums():", "    plt.figure(number).savefig(f'{number}.png')"])
    )
    said = run(tmp_path, str(tmp_path / "cells.py"))  # "plot_allocation.ipynb" without its text
    assert "self_attn.q_proj     2 blocks, 4 groups each, 2.000 bits on average" in said
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["1.png", "2.png"]
