"""A random LLaMA-7B on the device, dense and packed: tokens a second, memory, and the logits of both."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import Rows
from benchmarks.kernels import GROUP_SIZE, MIXES
from slimplus.evaluation.timed_model import timed_round
from slimplus.hub.checkpoint import dequantize
from slimplus.kernels.measure import random_layer, relative_error
from slimplus.nn import PackedLinear, prepare_inference

SIZES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1},
}
VOCABULARY = 32000
MIX = "2 (1/2/3)"
PROMPT, NEW = 2048, 128


def run(visit: Visit, rows: Rows) -> None:
    """Measure the dense model, then the packed one, with a cache that grows and with a static one."""
    name = "tiny" if visit.rehearsal else "llama-7b"
    tokens = (16, 3) if visit.rehearsal else (PROMPT, NEW)
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "packed": lambda: packed_model(visit, name, MIXES[MIX]),
        "dense": lambda: dense_model(visit, name),
    }
    for kind, make in makers.items():
        model = make().eval()
        case = {"model": name, "weights": kind}
        rows.measure({**case, "what": "memory"}, partial(_memory, visit, model))
        for static in (False, True):
            what = "static cache" if static else "dynamic cache"
            rows.measure({**case, "what": what}, partial(_speed, visit, model, *tokens, static))
        if kind == "packed":
            rows.measure({**case, "what": "logits of packed and dequantized layers"}, partial(_logits, visit, model))
        del model
        gc.collect()
        if visit.device.type == "cuda":
            torch.cuda.empty_cache()


def dense_model(visit: Visit, name: str) -> PreTrainedModel:
    """Return a model with random weights in bfloat16, on the device."""
    vocabulary = 64 if visit.rehearsal else VOCABULARY
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, **SIZES[name])
    torch.manual_seed(0)
    with visit.device:
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def packed_model(visit: Visit, name: str, widths: Sequence[int]) -> PreTrainedModel:
    """Return a model whose blocks hold packed layers with random integers, ready to multiply."""
    model: Any = dense_model(visit, name)
    for block in model.model.layers:
        for parent in list(block.modules()):
            for child, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, child, _packed_layer(linear, widths))
    for fused in prepare_inference(model):
        if fused.supports(torch.bfloat16, rows=1):
            fused.warm_up(torch.bfloat16)
    return cast(PreTrainedModel, model)


def _packed_layer(linear: nn.Linear, widths: Sequence[int]) -> PackedLinear:
    rows, columns = linear.weight.shape
    chosen = [widths[group % len(widths)] for group in range(-(-columns // GROUP_SIZE))]
    counts = {width: chosen.count(width) for width in sorted(set(chosen))}
    tensors = random_layer(rows, counts, GROUP_SIZE, linear.weight.device)
    layer = PackedLinear.from_tensors(tensors, columns, rows, GROUP_SIZE)
    layer.dtype = torch.bfloat16
    return layer


def _memory(visit: Visit, model: PreTrainedModel) -> dict[str, Any]:
    """Return the bytes of the model's tensors, and those that PyTorch has allocated on the device."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    gc.collect()
    allocated = torch.cuda.memory_allocated(visit.device) if visit.device.type == "cuda" else None
    return {"tensor_bytes": sum(tensors.values()), "allocated_bytes": allocated}


def _speed(visit: Visit, model: PreTrainedModel, prompt: int, new: int, static: bool) -> dict[str, Any]:
    """Return seconds and tokens a second of the faster of two rounds after one to warm up."""
    vocabulary = int(cast("Any", model.config).vocab_size)
    tokens = torch.randint(vocabulary, (1, prompt), device=visit.device)
    rounds = [timed_round(model, tokens, new, static) for _ in range(2 if visit.rehearsal else 3)][1:]
    prefill, decode = (min(each[key] for each in rounds) for key in ("prefill_seconds", "decode_seconds"))
    return {
        "prompt_tokens": prompt,
        "prefill_seconds": prefill,
        "new_tokens": new,
        "decode_tokens_per_second": (new - 1) / decode,
    }


@torch.no_grad()
def _logits(visit: Visit, model: PreTrainedModel) -> dict[str, Any]:
    """Return how far the logits of the kernels are from those of dequantized layers, into which the model is turned."""
    tokens = torch.randint(int(cast("Any", model.config).vocab_size), (1, 8), device=visit.device)
    packed: Tensor = cast("Any", model)(tokens).logits
    exact: Tensor = cast("Any", dequantize(model, torch.bfloat16))(tokens).logits
    agree = float((packed.argmax(-1) == exact.argmax(-1)).float().mean())
    return {"relative_error": relative_error(packed, exact.double()), "same_top_token": agree}
