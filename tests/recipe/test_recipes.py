"""The recipes that are shipped: valid, and the paper's and the real models' values."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.recipes import needs
from slimplus.models.loading import build_on_meta
from slimplus.pipeline.plan import dry_run
from slimplus.recipe.parsing import load_recipe, recipe_file, recipe_names
from tests.support.recipes import Arguments
from tests.support.runs import measured_run

PAPER = {"llama7b_2bit": 2, "llama7b_3bit": 3, "llama2_7b_2bit": 2, "llama3_8b_2bit": 2, "opt_1.3b_2bit": 2}

SMALL = ("smollm2_135m_2bit", "smollm2_135m_2bit_best", "gemma3_270m_2bit")  # which run from packages alone
LARGE = (
    *("llama3_1_8b_2bit", "llama3_1_70b_2bit", "mistral_7b_2bit", "qwen3_8b_2bit", "qwen3_30b_a3b_2bit"),
    "gemma3_12b_2bit",
)
METHODS = ("rtn", "gptq", "qep", "slimllm", "slimllm_plus", "omniquant", "signround", "efficientqat", "peqa")


def test_the_recipes_are_those_of_the_paper_the_demos_models_that_people_use_and_methods() -> None:
    assert set(recipe_names()) == {*PAPER, *SMALL, *LARGE, *(f"methods/{name}" for name in METHODS)}


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
        "zero_points": "fractional",
        "scale_bits": 16,
        "percdamp": 0.01,
        "error_propagation": 0.0,
        "embedding_bits": None,
        "head_bits": None,
        "allocation": None,
        "per_layer": False,
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
        ("llama3_1_8b_2bit", 8_030_261_248),
        ("llama3_1_70b_2bit", 70_553_706_496),
        ("mistral_7b_2bit", 7_248_023_552),
        ("qwen3_8b_2bit", 8_190_735_360),
        ("qwen3_30b_a3b_2bit", 30_532_122_624),
        ("gemma3_12b_2bit", 12_187_325_040),
    ],
)
def test_architecture_values_are_those_of_the_real_model(name: str, parameters: int) -> None:
    values = load_recipe([f"recipe={name}"]).model.config
    assert values is not None
    model = build_on_meta(AutoConfig.for_model(**values))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_llama3_keeps_its_rope_base() -> None:
    values = load_recipe(["recipe=llama3_8b_2bit"]).model.config or {}
    assert AutoConfig.for_model(**values).rope_parameters["rope_theta"] == 500_000.0


@pytest.mark.parametrize("name", [LARGE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE[1:])])
def test_the_header_says_what_a_large_model_needs(name: str) -> None:
    """As `python -m benchmarks.recipes --needs NAME` writes it."""
    line = recipe_file(name).read_text(encoding="utf-8").splitlines()[2]
    assert line == needs(load_recipe([f"recipe={name}"]))


def test_large_models_get_the_method_that_measured_best() -> None:
    best = load_recipe(["recipe=smollm2_135m_2bit_best"]).quantization
    for name in LARGE:
        recipe = load_recipe([f"recipe={name}"])
        settings = recipe.quantization
        assert (settings.method, settings.allocation, settings.bits) == (best.method, best.allocation, best.bits)
        assert recipe.training.parametrization == "rounding"
        assert recipe.end_to_end.epochs > 0


def test_methods_compare_at_equal_text_bits_and_steps() -> None:
    recipes = [load_recipe([f"recipe=methods/{name}"]) for name in METHODS]
    assert len({(str(recipe.model), str(recipe.data)) for recipe in recipes}) == 1
    assert {(recipe.quantization.bits, recipe.quantization.group_size) for recipe in recipes} == {(2, 64)}
    trained = [recipe.training for recipe in recipes if recipe.quantization.trains]
    assert {(training.epochs, training.batch_size) for training in trained} == {(8, 1)}


def _of_tiny_model(name: str, arguments: Arguments, folder: Path) -> list[str]:
    """The arguments of a small run that keep the method's own keys."""
    own = ("recipe=", "quantization.method=", "quantization.allocation=", "training.learning_rate=", "end_to_end.")
    return [f"recipe=methods/{name}", *(each for each in arguments(folder) if not each.startswith(own))]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_plan(name: str, arguments: Arguments, tmp_path: Path) -> None:
    plan = dry_run(load_recipe([*_of_tiny_model(name, arguments, tmp_path), "dry_run=true"]))
    assert "average bits               2.000" in plan


@pytest.mark.slow  # the other methods are parts that run elsewhere
@pytest.mark.parametrize("name", ["qep", "omniquant", "efficientqat", "peqa"])
def test_methods_made_of_several_parts_run_to_their_end(name: str, arguments: Arguments, tmp_path: Path) -> None:
    metrics = measured_run(_of_tiny_model(name, arguments, tmp_path))
    assert metrics["average_bits"] == 2
    assert 0 < metrics["perplexity"]["quantized"] < 1e4  # a random model's is near its vocabulary's size
