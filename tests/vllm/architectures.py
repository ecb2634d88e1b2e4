"""Tiny models of the dense architectures that both vLLM and slimplus know, and the table of what vLLM serves."""

from __future__ import annotations

from typing import Any

from tests.support.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "vllm.json"

# vLLM's attention on CPUs takes heads of 32 columns and more. With two ranks, o_proj and down_proj cut groups of 64.
LLAMA = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
HEAD = LLAMA | {"head_dim": 32}
GROUP_SIZE = 64

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": LLAMA,
    "arcee": LLAMA,
    "cohere": LLAMA,
    "ernie4_5": LLAMA,
    "exaone4": LLAMA,
    "falcon": {"hidden_size": 128, "num_attention_heads": 4, "new_decoder_architecture": False, "multi_query": True},
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "glm": HEAD,
    "glm4": LLAMA,
    "granite": LLAMA,
    "llama": LLAMA | {"tie_word_embeddings": True},
    "mistral": LLAMA | {"sliding_window": None},
    "nemotron": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "opt": {"hidden_size": 128, "ffn_dim": 320, "num_attention_heads": 4, "word_embed_proj_dim": 128},
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": HEAD,
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
}
"""`model_type` → sizes."""

COLUMNS = {
    "loads": "loads",
    "tokens": "greedy tokens equal",
    "lora": "LoRA",
    "head": "packed embedding and head",
    "tp2": "two ranks",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of what vLLM serves: a row an architecture, with notes for what it does not."""
    lines = [f"| architecture | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (len(COLUMNS) + 1)]
    lines += [
        f"| {row['model_type']} | {' | '.join('yes' if row[name] is True else 'no' for name in COLUMNS)} |"
        for row in rows
    ]
    return "\n".join(lines)
