"""Tiny random models that read images, and what they are asked about one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

IMAGE_TOKEN = 260
TOKENS = 4  # of an image
TEXT = {
    "vocab_size": 264,  # those of the byte-level tokenizer, and those around an image
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXTRAL = VISION | {"image_size": 28, "patch_size": 14, "head_dim": 16}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 8},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": TOKENS,
        "image_token_id": IMAGE_TOKEN,
        "boi_token_id": 261,
        "eoi_token_id": 262,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": PIXTRAL | {"model_type": "pixtral", "image_size": 56},
        "image_token_index": IMAGE_TOKEN,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN | {"hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 261,
        "vision_start_token_id": 262,
        "vision_end_token_id": 263,
    },
}
"""`model_type` → values of a tiny configuration, in which an image takes `TOKENS` tokens."""


def save_tiny_vision_model(folder: Path, model_type: str, tokenizer: Path, **values: Any) -> Path:
    """Writes a random model that reads images, a byte-level tokenizer, and the configuration of an image processor."""
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | values)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 4 * parameter.data + 0.1 * torch.randn_like(parameter.data)  # some begin at zero
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))
    return folder


def question(model_type: str, seed: int = 0) -> dict[str, Tensor]:
    """A question about a random image, as the model's forward and `generate` take it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[65, 66, *[IMAGE_TOKEN] * TOKENS, 67, 68, 69]])
    asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model_type == "qwen2_5_vl":
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        kinds = (tokens == IMAGE_TOKEN).int()
        return asked | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
    if model_type == "mistral3":
        pixels = torch.randn(1, 3, 56, 56, generator=generator)
        return asked | {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 56]])}
    return asked | {
        "pixel_values": torch.randn(1, 3, 28, 28, generator=generator),
        "token_type_ids": (tokens == IMAGE_TOKEN).long(),
    }
