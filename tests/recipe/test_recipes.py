"""The recipes that are shipped: valid, and the paper's and the real models' values."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimplus.recipe.parsing import load_recipe, recipe_file, recipe_names

PAPER = {"llama7b_2bit": 2, "llama7b_3bit": 3, "llama2_7b_2bit": 2, "llama3_8b_2bit": 2, "opt_1.3b_2bit": 2}


def test_the_recipes_are_those_of_the_paper_and_the_demo() -> None:
    assert set(recipe_names()) == {*PAPER, "smollm2_135m_2bit", "smollm2_135m_2bit_best"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_its_header_is_its_command(name: str) -> None:
    recipe = load_recipe([f"recipe={name}"])
    assert recipe.run_dir == f"runs/{name}"
    command, about = recipe_file(name).read_text(encoding="utf-8").splitlines()[:2]
    assert command == f"# python train.py recipe={name}"
    assert about.startswith("# ")


@pytest.mark.parametrize(("name", "bits"), PAPER.items())
def test_paper_recipes_hold_the_papers_settings(name: str, bits: int) -> None:
    recipe = load_recipe([f"recipe={name}"])
    assert recipe.quantization.model_dump() | {"percdamp": 0.01} == {
        "method": "slimllm_plus",
        "bits": bits,
        "group_size": 128,
        "scale_bits": 16,
        "percdamp": 0.01,
        "embedding_bits": None,
        "head_bits": None,
        "allocation": None,
        "widths": [1, 2, 3, 4],
        "size_bytes": None,
    }
    assert (recipe.data.samples, recipe.data.sequence_length) == (128, 2048)
    assert (recipe.data.calibration.path, recipe.data.evaluation.path) == ("wikitext2", "wikitext2")
    assert recipe.data.evaluation.sequence_length == 2048


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama7b_2bit", 6_738_415_616),
        ("llama2_7b_2bit", 6_738_415_616),
        ("llama3_8b_2bit", 8_030_261_248),
        ("opt_1.3b_2bit", 1_315_758_080),
    ],
)
def test_architecture_values_are_those_of_the_real_model(name: str, parameters: int) -> None:
    values = load_recipe([f"recipe={name}"]).model.config
    assert values is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_llama3_keeps_its_rope_base() -> None:
    values = load_recipe(["recipe=llama3_8b_2bit"]).model.config or {}
    assert AutoConfig.for_model(**values).rope_parameters["rope_theta"] == 500_000.0
