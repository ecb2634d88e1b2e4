"""What a run warns of and ends well all the same: weights too small to store, blind spots, no sample sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimplus.pipeline.stages import evaluate
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run


@pytest.fixture
def odd_model(make_model: ModelMaker, tmp_path: Path) -> Path:
    """An OPT whose ReLU silences five channels, and one of whose layers lies below the smallest scale."""
    folder = shutil.copytree(make_model("opt"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.decoder.layers.0"
    assert f"{prefix}.fc1.bias" in tensors
    tensors[f"{prefix}.fc1.bias"][:5] = -1e4
    tensors["model.decoder.layers.1.self_attn.q_proj.weight"] *= 2.0**-24
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_says_what_it_could_not_do_well(
    arguments: Arguments, odd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(evaluate, "continue_text", fail)
    folder = tmp_path / "run"
    keys = arguments(folder, "quantization.method=gptq", "quantization.bits=4", model=odd_model)
    summary = run(keys)
    metrics = read_metrics(folder)
    first, second = metrics["blocks"]
    assert first["dead_columns"] == {"fc2": 5}
    (blind,) = first["events"]
    assert blind.startswith(
        "no calibration token reaches these input columns: 5 of 128 of fc2; they are rounded to near"
    )
    assert second["dead_columns"] == {}
    (small,) = second["events"]
    assert small.startswith("these scales lie beyond what 16 bits reach, ")
    assert ": 256 of 256 of self_attn.q_proj; multiply" in small
    (failed,) = metrics["events"]
    assert failed == "the checkpoint's sample sentence could not be written: IndexError: index out of range in self"
    assert all(sentence in summary for sentence in (blind, small, failed))
    assert "It writes" not in summary
    assert run(keys) == summary  # at the next start nothing is done again

    full = load_file(odd_model / "model.safetensors")["model.decoder.layers.0.fc2.weight"].float()
    from slimplus import load

    packed: Any = load(folder / "packed", dtype=torch.float32)
    level = packed.model.decoder.layers[0].fc2.dequantize()
    assert (level - full)[:, :5].norm() < 0.2 * full[:, :5].norm()
