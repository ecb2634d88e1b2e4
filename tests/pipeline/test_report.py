"""The model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from slimplus.hub.push import PLACE
from slimplus.pipeline.model_card import dataset_type, model_card
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


def test_the_card_has_its_figures_in_the_hubs_form(finished: Path) -> None:
    data: Any = ModelCard.load(finished / "packed" / "README.md").data
    metrics = read_metrics(finished)
    text = metrics["evaluation"]["text"]
    assert data.base_model is None  # a folder of this machine is no model of the hub
    assert data.eval_results is not None
    found = {result.metric_type: result for result in data.eval_results}
    assert found["perplexity"].metric_value == metrics["perplexity"]["quantized"]
    assert found["kl_divergence"].metric_value == metrics["divergence"]["kl_mean"]
    assert found["accuracy"].metric_value == metrics["divergence"]["top_token_agreement"]
    assert {result.dataset_name for result in data.eval_results} == {f"{Path(text).name}, 2 × 64"}


def test_the_card_names_the_model_on_the_hub_and_scores_of_tasks() -> None:
    recipe = load_recipe(["recipe=llama7b_2bit", "model.path=org/name"])
    row = {"part_of": None, "num_fewshot": 0, "metric": "acc", "value": 0.5, "task": "piqa"}
    scores = {
        "quantized": [row, {**row, "task": "part", "part_of": "all"}, {**row, "task": "broken", "value": math.inf}]
    }
    card: Any = ModelCard(model_card(recipe, "AutoModelForCausalLM", 2.0, 1.0, {"tasks": {"scores": scores}}))
    assert card.data.base_model == "org/name"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("piqa, 0-shot", 0.5)
    for words in ("transformers", f"slimplus generate {PLACE}", f"vllm serve {PLACE}", "--to gguf", "llama-cli"):
        assert words in card.text


def test_the_card_tells_no_folders_of_texts() -> None:
    assert dataset_type("wikitext2") == "Salesforce/wikitext"
    assert dataset_type("/home/somebody/notes.txt") == "notes.txt"
