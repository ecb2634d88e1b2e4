"""Models that read images: their text model is quantized, all else is carried over, and they answer about an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import slimplus
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.nn import PackedLinear
from slimplus.pipeline.self_check import describe, self_check
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run
from tests.support.vision import CONFIGS, question, save_tiny_vision_model

ROUNDED = ("quantization.method=rtn", "quantization.bits=4", "quantization.group_size=64")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral3", "qwen2_5_vl")]


def _run(arguments: Arguments, make_model: ModelMaker, folder: Path, model_type: str, *keys: str) -> tuple[Any, Path]:
    """The full-precision model in float32 and the folder of its packed checkpoint, once it has been quantized."""
    source = save_tiny_vision_model(folder / "model", model_type, make_model("llama"))
    run(arguments(folder / "run", *ROUNDED, *keys, model=source))
    full = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    return full.requires_grad_(False), folder / "run" / "packed"


@pytest.mark.parametrize("model_type", ["gemma3", *SLOW])
def test_a_packed_model_answers_about_an_image(
    arguments: Arguments, make_model: ModelMaker, tmp_path: Path, model_type: str
) -> None:
    """As the full-precision model does with the dequantized weights, to the bit, from either way of loading."""
    expected, folder = _run(arguments, make_model, tmp_path, model_type)
    packed: Any = slimplus.load(folder, dtype=torch.float32)
    assert type(packed) is type(expected)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 14
    assert all("language_model.layers" in name for name in layers)
    for name, layer in layers.items():
        expected.set_submodule(name, layer.to_linear())
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    asked, other = question(model_type), question(model_type, seed=1)
    logits = expected(**asked).logits
    assert not torch.equal(logits, expected(**other).logits)  # the image matters
    keys = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model: Any
    for model in (packed, again):
        model.requires_grad_(False)
        torch.testing.assert_close(model(**asked).logits, logits, atol=0, rtol=0)
        assert torch.equal(model.generate(**asked, **keys), expected.generate(**asked, **keys))


def test_all_but_the_text_model_is_carried_over(arguments: Arguments, make_model: ModelMaker, tmp_path: Path) -> None:
    """Trained end to end as well, which trains the norms of the text model alone."""
    keys = ("end_to_end.epochs=1", "end_to_end.norm_learning_rate=0.1", "quantization.embedding_bits=8")
    full, folder = _run(arguments, make_model, tmp_path, "gemma3", *keys)
    packed: Any = slimplus.load(folder, dtype=torch.float32)
    for name in ("vision_tower", "multi_modal_projector"):
        stored, kept = full.model.get_submodule(name).state_dict(), packed.model.get_submodule(name).state_dict()
        assert stored.keys() == kept.keys()
        assert all(torch.equal(kept[key], tensor) for key, tensor in stored.items())
    norm = "model.language_model.norm.weight"
    assert not torch.equal(packed.get_parameter(norm), full.get_parameter(norm))
    processor = "preprocessor_config.json"
    assert (folder / processor).read_bytes() == (tmp_path / "model" / processor).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "model", folder))
    assert after["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert after["vision_config"] == before["vision_config"] | {"dtype": "bfloat16"}
    assert after["image_token_index"] == before["image_token_index"]
    assert "AutoModelForImageTextToText.from_pretrained" in (folder / "README.md").read_text()
    assert read_metrics(tmp_path / "run")["packed_share"] > 0.9


@pytest.mark.parametrize("model_type", CONFIGS)
def test_check_tells_what_is_carried_over(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    rows = describe(build_on_meta(config)).rows()
    self_check(config)
    assert rows["blocks"] == "2 in model.language_model.layers"
    assert "weights)" in rows["carried over as it is"]
    tower = "model.visual" if model_type == "qwen2_5_vl" else "model.vision_tower"
    assert rows["carried over as it is"].startswith(f"{tower} (")


def test_a_tower_stays_in_its_stored_dtype(make_model: ModelMaker, tmp_path: Path) -> None:
    """Text does not run through it: it is neither moved to the device nor cast."""
    from slimplus.models.streaming import StreamedModel
    from tests.support.blocks import RUNNER

    source = save_tiny_vision_model(tmp_path, "gemma3", make_model("llama"))
    streamed = StreamedModel(ModelSource(str(source)).model(), RUNNER)
    model: Any = streamed.model
    assert model.model.vision_tower.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.float32
