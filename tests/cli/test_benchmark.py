"""slimplus benchmark measures a packed model beside the full-precision one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from slimplus.hub.contents import read_contents
from tests.support.models import ModelMaker
from tests.support.processes import run_console


@pytest.mark.slow
def test_benchmark_measures_both_side_by_side(packed: Path, make_model: ModelMaker, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = ["--prompt-tokens", "16", "--new-tokens", "4", "--rounds", "3"]
    process = run_console("benchmark", str(packed), "--dense", str(make_model("llama")), *sizes, "--json", str(file))
    assert process.returncode == 0, process.stderr
    result = json.loads(file.read_text())
    contents = read_contents(str(packed))
    assert result["machine"]["torch"] == torch.__version__
    assert result["workload"]["prompt_tokens"] == 16
    for name, model in result["models"].items():
        assert len(model["rounds"]) == 3
        decode = sorted(each["decode_seconds"] for each in model["rounds"])[1]
        assert model["decode_tokens_per_second"] == pytest.approx(3 / decode)
        assert model["peak_resident_bytes"] >= model["resident_bytes"] > 1e8, name
        assert model["load_seconds"] > 0
    packed_model, dense = result["models"]["packed"], result["models"]["dense"]
    assert packed_model["weight_bytes"] >= contents.size_bytes
    assert dense["weight_bytes"] >= contents.full_size_bytes
    for figure, ratio in result["packed_over_dense"].items():
        assert ratio == pytest.approx(packed_model[figure] / dense[figure])
    assert re.search(r"^decode, tokens/s +[\d.]+ +[\d.]+ +[\d.]+$", process.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_benchmark(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    process = run_console(
        "benchmark", str(packed), "--dense", str(tmp_path), "--prompt-tokens", "8", "--new-tokens", "4"
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"--dense: {tmp_path} holds no weights: ")
    assert process.stdout == ""
