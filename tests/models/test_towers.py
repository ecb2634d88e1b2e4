"""The parts of a model that a text does not run through, and the class that builds the whole model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from slimplus.models.architectures import blocks_path, position_table, text_norms
from slimplus.models.auto_class import auto_class
from slimplus.models.loading import build_on_meta
from slimplus.models.shrink import shrink
from slimplus.models.towers import carried_over, towers
from tests.support.vision import CONFIGS


@pytest.mark.parametrize(
    ("model_type", "tower", "other"),
    [
        ("gemma3", "model.vision_tower", "model.multi_modal_projector"),
        ("llama4", "vision_model", "multi_modal_projector"),
        ("qwen3_vl", "model.visual", None),
    ],
)
def test_towers_and_projectors_are_carried_over(model_type: str, tower: str, other: str | None) -> None:
    model = build_on_meta(shrink(AutoConfig.for_model(model_type), 2))
    assert list(towers(model)) == [tower]
    assert set(carried_over(model)) == {tower, other} - {None}
    assert "language_model" in blocks_path(model)
    assert position_table(model) is None  # the tower's table of positions is none of the text's


def test_nothing_of_a_language_model_is_carried_over() -> None:
    model = build_on_meta(shrink(AutoConfig.for_model("opt"), 2))
    assert carried_over(model) == {}
    assert position_table(model) == 2048


def test_blocks_are_those_of_the_text_although_the_tower_has_as_many_and_larger_ones() -> None:
    values = CONFIGS["gemma3"]
    large = values["vision_config"] | {"hidden_size": 256, "intermediate_size": 512}
    model = build_on_meta(AutoConfig.for_model("gemma3", **values | {"vision_config": large}))
    assert blocks_path(model) == "model.language_model.layers"
    names = {id(module): name for name, module in model.named_modules()}
    assert all("language_model" in names[id(norm)] for norm in text_norms(model))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, AutoModelForCausalLM),
        ({"model_type": "gemma3"}, AutoModelForImageTextToText),
        ({"model_type": "llama4"}, AutoModelForImageTextToText),
        ({"model_type": "llama4", "architectures": ["Llama4ForCausalLM"]}, AutoModelForCausalLM),
        ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}, AutoModelForImageTextToText),
        ({"model_type": "unknown", "architectures": {}}, AutoModelForCausalLM),
        ({"model_type": ["llama"]}, AutoModelForCausalLM),
    ],
)
def test_the_class_builds_the_whole_model(config: dict[str, Any], expected: Any) -> None:
    assert auto_class(config) is expected
