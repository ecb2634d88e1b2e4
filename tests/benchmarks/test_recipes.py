"""benchmarks/recipes.py: rows of finished runs, and hours by measured blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipes import BLOCK_WEIGHTS, RESULTS, block_hours, row
from slimplus.models.architectures import find_blocks
from slimplus.models.loading import build_on_meta
from slimplus.recipe.parsing import load_recipe
from tests.support.runs import read_metrics


def test_a_row_holds_the_figures_machine_and_versions_of_a_run(finished: Path) -> None:
    metrics = read_metrics(finished)
    made = row("mine", metrics)
    assert made["perplexity"] == metrics["perplexity"]
    assert made["machine"]["transformers"] == metrics["libraries"]["transformers"]
    assert made["machine"]["commit"] == metrics["machine"]["commit"]
    with pytest.raises(ValueError, match="the run of mine is not finished"):
        row("mine", metrics | {"perplexity": {"full": 3.0}})


def test_hours_are_the_measured_ones_at_the_measured_shape_windows_and_steps() -> None:
    values = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
    text = json.dumps({"model_type": "llama", **values})
    keys = ["data.samples=128", "data.sequence_length=2048", "training.epochs=4", f"model.config={text}"]
    recipe = load_recipe(["recipe=llama7b_2bit", *keys])
    measured: Any = json.loads((RESULTS / "block_shapes.json").read_text())["rows"][0]
    assert measured["shape"] == "llama_7b"
    assert block_hours(recipe) == pytest.approx(measured["hours"])


@pytest.mark.parametrize(("shape", "recipe"), [("llama_7b", "llama7b_2bit"), ("llama2_70b", "llama3_1_70b_2bit")])
def test_weights_of_the_measured_blocks(shape: str, recipe: str) -> None:
    from slimplus.models.loading import ModelSource

    values = load_recipe([f"recipe={recipe}"]).model.config
    assert values is not None
    (block,) = find_blocks(build_on_meta(ModelSource.config_of(values | {"num_hidden_layers": 1})))
    assert sum(parameter.numel() for parameter in block.parameters()) == BLOCK_WEIGHTS[shape]
