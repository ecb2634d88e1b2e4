"""Runs in this process, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slimplus.pipeline import run as pipeline
from slimplus.recipe.parsing import load_recipe


def run(arguments: list[str]) -> str:
    """The summary of a run that ends well."""
    summary = pipeline.run(load_recipe(arguments))
    assert summary is not None
    return summary


def measured_run(arguments: list[str]) -> dict[str, Any]:
    """The metrics of a run that ends well."""
    run(arguments)
    return read_metrics(Path(load_recipe(arguments).run_dir))


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def packed_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the packed checkpoint in a run directory."""
    return load_file(folder / "packed" / "model.safetensors")
