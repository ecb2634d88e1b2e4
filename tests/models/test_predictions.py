"""Logits of a whole model, and those of other hidden states."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from slimplus.models.auto_class import auto_class
from slimplus.models.predictions import logits_of, predict
from slimplus.models.shrink import shrink


@pytest.mark.parametrize("model_type", ["cohere", "gemma2", "gemma3", "granite", "llama", "minicpm3", "opt"])
def test_logits_of_other_states_are_scaled_and_capped_as_the_model_does(model_type: str) -> None:
    config = shrink(AutoConfig.for_model(model_type), 2)
    torch.manual_seed(0)
    model = auto_class(config.to_dict()).from_config(config).eval()
    tokens = torch.randint(1, 200, (2, 2, 12))
    with torch.no_grad():
        first, second = (predict(model, each) for each in tokens)
        assert torch.equal(first.logits, model(input_ids=tokens[0], use_cache=False).logits)
        assert torch.equal(logits_of(model, second.states, first), second.logits)
        assert not torch.equal(second.logits, first.logits)
        assert torch.equal(predict(model, tokens[0]).logits, first.logits)
    if model_type in ("cohere", "gemma2"):
        assert not torch.equal(model.get_output_embeddings()(first.states), first.logits)
