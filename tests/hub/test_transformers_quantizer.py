"""What transformers and lm-eval make of a packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, pipeline

import slimplus
from tests.support.models import expected_text

PROMPT = "Functions are"


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
    """Needs `pip install lm-eval`, which is no dependency of this package."""
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
