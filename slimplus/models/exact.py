"""Whether a model was loaded exactly: every tensor of the file has its place, and every place its finite tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CODES = re.compile(r"(_scale(_inv)?|\.scales?|zeros|\.qweight|\.g_idx|\.absmax|\.quant_map|\.quant_state\..*|\.SCB)$")
"""Names under which quantized checkpoints keep what belongs to their codes."""
ADAPTERS = ("base_model.model.", ".lora_A", ".lora_B", ".base_layer.")
DAMAGED = "download the weights again, or take a checkpoint of the training from before"


def key_problem(info: Mapping[str, Any]) -> str | None:
    """Return a sentence if the tensors of a file are not those of the architecture.

    Args:
        info: what transformers tells of a load with `output_loading_info`, which leaves out what is harmless, such as
            the frequencies of rotary positions and a head that is tied.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        return (
            f"{name} has the shape {list(stored)} in the file and {list(expected)} by config.json"
            f"{_others(mismatched)}; give the config.json that belongs to the weights"
        )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if codes := [name for name in unexpected if CODES.search(name)]:
        return (
            f"{codes[0]} belongs to weights that are quantized already{_others(codes)}; give the full-precision model"
        )
    if adapters := [name for name in unexpected if any(mark in name for mark in ADAPTERS)]:
        return (
            f"{adapters[0]} belongs to an adapter{_others(adapters)}; merge it into its model with PEFT's "
            "merge_and_unload, and give that model's folder"
        )
    if prefix := _prefix(missing, unexpected):
        return (
            f"the names of the tensors begin with {prefix!r}, as in {unexpected[0]}, and the architecture's do not; "
            "save the model that is wrapped (model._orig_mod after torch.compile, model.module after "
            "DistributedDataParallel)"
        )
    return _missing_or_unexpected(missing, unexpected)


def _missing_or_unexpected(missing: list[str], unexpected: list[str]) -> str | None:
    """Return a sentence on names that are only in the architecture, or only in the file."""
    if not missing and not unexpected:
        return None
    parts = []
    if missing:
        parts.append(f"{missing[0]} is missing{_others(missing)}")
    if unexpected:
        parts.append(f"{unexpected[0]} is in the file, but not in the architecture{_others(unexpected)}")
    remedy = "config.json, its num_hidden_layers for one, must belong to the weights; or download them again"
    if missing == ["lm_head.weight"] and not unexpected:
        remedy = "if the head is the embedding, set tie_word_embeddings to true in config.json"
    return f"{'; '.join(parts)}; {remedy}"


def _others(names: list[Any]) -> str:
    """Return how many more names there are than the first, which the sentence holds."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """Return the prefix that makes the file's names of the architecture's, if one does for most of them."""
    for name in unexpected[:1]:
        for wanted in sorted(missing, key=len, reverse=True):
            if name.endswith(f".{wanted}"):
                prefix = name.removesuffix(wanted)
                found = sum(f"{prefix}{other}" in unexpected for other in missing)
                return prefix if 2 * found > len(missing) else None
    return None


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return `NAME holds NaN` or `NAME holds infinity` for the first tensor that does; they are read one by one."""
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)  # which passes NaN on; isfinite would take a copy, and twenty times as long
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return f"{name} holds {'NaN' if low.isnan() else 'infinity'}"
    return None


def finite_problem(model: nn.Module) -> str | None:
    """Return a sentence if a loaded model, whose parameters are as its file has them, holds NaN or infinity."""
    if found := not_finite(model.named_parameters()):
        return f"{found}; {DAMAGED}"
    found = not_finite(model.named_buffers())
    return f"{found}, which follows from config.json: correct its rope values" if found else None
