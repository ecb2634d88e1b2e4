"""The model card."""

from __future__ import annotations

from pathlib import Path

import yaml

from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import to_yaml
from tests.support.runs import read_metrics


def test_model_card(finished: Path) -> None:
    card = (finished / "packed" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    metrics = read_metrics(finished)
    assert f"{metrics['perplexity']['quantized']:.2f}" in body
    assert "slimllm_plus" in body
    assert to_yaml(load_recipe([f"recipe={finished / 'recipe.yaml'}"])) in body
