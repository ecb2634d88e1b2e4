"""Tiny random models, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ModelMaker = Callable[..., Path]
"""The fixture `make_model`: `make_model(model_type, blocks=2)` gives the folder of a tiny model."""

TINY = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    },
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "olmo": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
    },
}
"""`model_type` → sizes. LLaMA's 160 columns leave a ragged last group of 64. OLMo's norms have no weights."""


def save_tiny_model(folder: Path, model_type: str, blocks: int, sizes: dict[str, int]) -> Path:
    """Writes a random model and a byte-level tokenizer to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    values = TINY[model_type] | sizes | {"num_hidden_layers": blocks, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Larger than usual, or the logits say nothing; columns of different size, or mixing bits never pays.
            parameter.data *= 4 * torch.exp(torch.randn(parameter.shape[-1]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected_text(model: Any, tokenizer: Any, prompt: str, **arguments: Any) -> str:
    """What the model writes after a prompt, by `generate` itself."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, pad_token_id=0, **arguments)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))
