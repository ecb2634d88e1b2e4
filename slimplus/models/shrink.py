"""Shrinking of a configuration: every kind of block of the architecture, as narrow as its heads allow.

A model of the result has random weights and runs in a second, so that an architecture can be tried before anything is
downloaded or computed.
"""

from __future__ import annotations

import re
from copy import deepcopy
from math import gcd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers imports this package while it is being imported itself
    from transformers import PretrainedConfig

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
"""Keys that hold the number of blocks."""

TOWER_LAYERS = ("depth", "num_global_layers", "encoder_layers")
"""Further keys of that kind in the configurations of towers."""

HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    *("encoder_attention_heads", "swa_num_attention_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"),
)
"""Keys that hold a number of heads. Heads keep their size, so that what a rotary embedding needs stays as it is."""

GROUPED_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups")
"""Keys of heads of which there may be fewer than factor says; one always remains."""

WIDTHS = re.compile(
    r"(\w+_)?(hidden_size|intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size)|d_model|n_embd|n_inner|dff"
    r"|dim_ff|word_embed_proj_dim|mamba_d_ssm|d_inner|embedding_dim|lru_width"
)
"""Keys of sizes that shrink with the number of heads."""

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num")
VOCABULARIES = re.compile(r"(\w+_)?vocab_size(_per_layer_input)?")
INDEX = re.compile(r"(\w+_)?(token_id|token_index)")
VOCABULARY, FEW_EXPERTS, NARROW = 256, 16, 256
TOWER_BLOCKS = 2
MOST_BLOCKS = 12
"""Blocks of a shrunken model at most; real models repeat their kinds of blocks sooner."""


def number_of_blocks(config: PretrainedConfig) -> int | None:
    """Return the number of blocks that a text configuration gives, or None if it gives none."""
    values = config.to_dict()
    found = (getattr(config, config.attribute_map.get(key, key), None) for key in LAYERS if key in values)
    return next((count for count in found if isinstance(count, int)), None)


def shrink(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """Return a configuration of the same architecture with fewer blocks, heads, experts and tokens.

    Args:
        config: the configuration of a model; of a multimodal one the text model is shrunk, and the towers for images
            and sounds get few blocks.
        blocks: how many blocks to keep, the first ones.

    Raises:
        ValueError: if the architecture's own checks refuse the shrunken values; also `StrictDataclassError`.
    """
    shrunken = deepcopy(config)
    text = shrunken.get_text_config()
    values = text.to_dict()
    factor, before = _factor(values), number_of_blocks(text)
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, list | tuple) and before and len(value) == before and not key.startswith("_"):
            changed[key] = [_scaled(key, item, factor) for item in value][:blocks]
        elif isinstance(value, dict) and key == "per_layer_config":
            changed[key] = {index: own for index, own in value.items() if int(index) < blocks}
        elif isinstance(value, int):
            changed[key] = min(value, blocks) if key in LAYERS else _scaled(key, value, factor)
    for key, value in changed.items():
        if value != values[key]:
            setattr(text, key, value)
    for name in shrunken.sub_configs:
        tower = getattr(shrunken, name, None)
        if tower is not None and tower is not text:
            _shorten(tower)
    return type(shrunken).from_dict(shrunken.to_dict())


def _shorten(tower: PretrainedConfig) -> None:
    """Give a tower, of which no block is tried, as few blocks as there can be."""
    for key, value in tower.to_dict().items():
        if key in (*LAYERS, *TOWER_LAYERS) and isinstance(value, int):
            setattr(tower, key, min(value, TOWER_BLOCKS))


def _factor(values: dict[str, Any]) -> int:
    """Return the number that divides the heads and the widths of a configuration."""
    width = next((values[key] for key in ("hidden_size", "d_model", "n_embd") if isinstance(values.get(key), int)), 0)
    heads = [values[key] for key in HEADS if isinstance(values.get(key), int) and values[key] > 0]
    common = gcd(width, *heads) if width else 1
    factors = [number for number in range(common, 0, -1) if common % number == 0]
    several = [number for number in factors if all(count >= 2 * number for count in heads)]
    wide = next((number for number in several if width // number >= NARROW), 1)
    return wide if wide > 1 else next((number for number in factors if width // number >= NARROW // 4), 1)


def _scaled(key: str, value: Any, factor: int) -> Any:
    """Return the shrunken value of a key."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key in HEADS:
        return value // factor
    if key in GROUPED_HEADS:
        return max(value // factor, 1)
    if WIDTHS.fullmatch(key) and value >= NARROW:
        return max(-(-value // factor) // 32 * 32, 32)
    if key in EXPERTS:
        return min(value, FEW_EXPERTS)
    if VOCABULARIES.fullmatch(key):
        return min(value, VOCABULARY)
    if INDEX.fullmatch(key):
        return value if value < VOCABULARY else 0
    return value
