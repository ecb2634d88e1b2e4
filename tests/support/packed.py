"""Packed checkpoints of tiny models made without a run: rounded to nearest, with several widths in each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimplus.format.affine import (
    QuantizedWeight,
    choose_qparams,
    group_count,
    quantize,
    storable_scale,
    storable_zero_point,
)
from slimplus.format.planes import count_bits, pack
from slimplus.hub.checkpoint import write_checkpoint
from slimplus.hub.transformers_quantizer import SlimplusConfig


def save_packed(
    source: Path,
    folder: Path,
    widths: Sequence[int] = (2, 3, 4),
    group_size: int = 32,
    outer: Sequence[str] = (),
    by_layer: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Packs the linear layers of the blocks, and those outside that `outer` names, which get 8 bits.

    `by_layer` has widths for layers by the end of their names, the first that fits, in the place of `widths`.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    tensors = dict(model.state_dict())
    modules, shapes = {}, {}
    for name, layer in model.named_modules():
        in_block = isinstance(layer, nn.Linear) and re.search(r"\.\d+\.", name) is not None
        if not in_block and name not in outer:
            continue
        weight = layer.weight.detach().float()
        groups = group_count(weight.shape[1], group_size)
        own = next((each for end, each in (by_layer or {}).items() if name.endswith(end)), widths)
        chosen = torch.tensor(own, dtype=torch.int32)[torch.randint(len(own), (groups,), generator=generator)]
        bits = chosen if in_block else torch.full_like(chosen, 8)
        scale, zero_point = choose_qparams(weight, bits, group_size)
        scale, zero_point = storable_scale(scale), storable_zero_point(zero_point, bits)
        integers = quantize(weight, scale, zero_point, bits, group_size)
        packed = pack(QuantizedWeight(integers, scale, zero_point, bits, group_size))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
        modules[name], shapes[name] = count_bits(bits), list(weight.shape)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    config = SlimplusConfig(3, group_size, modules, "rtn", shapes, 2 * model.num_parameters())
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_checkpoint(folder, tensors.items(), model.config, config, tokenizer, model.generation_config, "A tiny model.")
    return folder
