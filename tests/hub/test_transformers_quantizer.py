"""What transformers and lm-eval make of a packed checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
    pipeline,
)

import slimplus
from tests.support.models import ModelMaker, expected_text
from tests.support.packed import save_packed

PROMPT = "Functions are"
EVERYTHING = ["model.embed_tokens", "lm_head"]
"""What is packed beside the blocks where nothing of OLMo is left."""


def test_a_padded_batch_generates_what_each_prompt_does(model: Any, tokenizer: Any) -> None:
    prompts = ["A function is", "Modules"]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert not inputs["attention_mask"].all()
    together = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[:, -6:]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        assert torch.equal(alone[0, -6:], tokens)


def test_generate_compiles_with_a_static_cache(packed: Path, tokenizer: Any) -> None:
    """In one graph; transformers does it by itself on a GPU."""
    model = slimplus.load(packed, dtype=torch.bfloat16).eval()
    assert model.hf_quantizer.is_compileable
    settings: Any = CompileConfig(backend="eager", mode="default", fullgraph=True)
    settings._compile_all_devices = True
    inputs = tokenizer(PROMPT, return_tensors="pt")
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process have counted as well
    plain = model.generate(**inputs, **arguments)
    compiled = model.generate(**inputs, **arguments, cache_implementation="static", compile_config=settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(plain, compiled)


def test_pipeline_finds_the_packed_model(packed: Path, model: Any, tokenizer: Any) -> None:
    generator = pipeline("text-generation", model=str(packed), dtype=torch.float32, device="cpu")
    assert type(generator.model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
    (answer,) = generator(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert answer["generated_text"] == PROMPT + expected_text(
        model, tokenizer, PROMPT, max_new_tokens=6, do_sample=False
    )


def test_lm_eval_scores_the_model(model: Any, tokenizer: Any) -> None:
    """Needs the extra `tasks`."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    scorer = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [(PROMPT, " small"), ("Modules", " have names")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (context, continuation), (score, _) in zip(pairs, scorer.loglikelihood(requests), strict=True):
        tokens = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        assert score == pytest.approx(chances[-len(tokenizer(continuation)["input_ids"]) :].sum().item(), rel=1e-4)


def test_a_base_model_and_one_with_another_head_are_parts_of_the_checkpoint(
    packed: Path, model: Any, tmp_path: Path
) -> None:
    tokens = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model.model(tokens).last_hidden_state
    base = AutoModel.from_pretrained(packed, dtype=torch.float32)
    assert torch.equal(base(tokens).last_hidden_state, expected)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(packed, dtype=torch.float32, num_labels=3)
    assert torch.equal(classifier.model(tokens).last_hidden_state, expected)
    assert classifier(tokens[:1]).logits.shape == (1, 3)
    base.save_pretrained(tmp_path / "base")
    classifier.save_pretrained(tmp_path / "classifier")
    again: Any = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(again(tokens).last_hidden_state, expected)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", dtype=torch.float32)
    assert torch.equal(again(tokens[:1]).logits, classifier(tokens[:1]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_which_nothing_is_left_unpacked_loads_and_generates(
    make_model: ModelMaker, tmp_path: Path, dtype: torch.dtype
) -> None:
    """transformers asks a parameter for dtype and device, also of the base model."""
    packed = save_packed(make_model("olmo"), tmp_path / "packed", outer=EVERYTHING)
    model: Any = slimplus.load(packed, dtype=dtype)
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    assert model.num_parameters() == 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(torch.tensor([[5, 6, 7]]), **settings)
    base: Any = AutoModel.from_pretrained(packed, dtype=dtype)
    assert base.dtype == dtype
    assert torch.equal(base(written).last_hidden_state, model.model(written).last_hidden_state)
    model.save_pretrained(tmp_path / "again")
    again: Any = slimplus.load(tmp_path / "again", dtype=dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again.generate(torch.tensor([[5, 6, 7]]), **settings), written)
    assert slimplus.dequantize(model).num_parameters() > 0
    assert all(parameter.numel() for parameter in model.parameters())


def test_a_tensor_that_is_missing_in_a_part_is_named(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "packed")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"lacks the tensor (model\.)?norm\.weight"):
            kind.from_pretrained(copy)


@pytest.mark.parametrize(
    ("model_type", "outer"),
    [
        ("llama", ["model.embed_tokens"]),
        ("opt", ["model.decoder.embed_tokens"]),
        ("qwen2", ["lm_head"]),
        ("olmo", EVERYTHING),
    ],
)
def test_dequantized_models_are_ordinary_ones(
    make_model: ModelMaker, tmp_path: Path, model_type: str, outer: list[str]
) -> None:
    packed = save_packed(make_model(model_type), tmp_path / "packed", outer=outer)
    tokens = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    model: Any = slimplus.load(packed, dtype=torch.float32)
    expected = model(tokens).logits
    base: Any = AutoModel.from_pretrained(packed, dtype=torch.float32)
    assert torch.equal(base(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    if outer != ["lm_head"]:
        with pytest.raises(ValueError, match=r"packed embedding cannot be resized; slimplus\.dequantize"):
            model.resize_token_embeddings(300)
    assert slimplus.dequantize(model) is model
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "dense")
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert dense.config.to_dict().get("quantization_config") is None
    torch.testing.assert_close(dense(tokens).logits, expected, atol=1e-4, rtol=1e-5)
    model.resize_token_embeddings(300, mean_resizing=False)
    torch.testing.assert_close(model(tokens).logits[..., :257], expected, atol=1e-4, rtol=1e-5)
