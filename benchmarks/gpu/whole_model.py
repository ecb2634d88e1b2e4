"""A random LLaMA-7B on the device, dense and packed: tokens a second, memory, texts and logits of several ways."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.cost_model import BYTES_A_SECOND, predict_step
from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import layers, predict_layer
from benchmarks.kernels import GROUP_SIZE, MIXES
from slimplus.evaluation.decoding import GraphDecoder
from slimplus.evaluation.timed_model import NO_TOKEN, timed_round
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
BATCHES, BATCHED_PROMPT = (4, 16), 256
WAYS = ("dynamic cache", "graph", "static cache")
"""How to decode: as transformers does by default, with the step that it compiles, or with a `GraphDecoder`."""
AGAIN = 20  # texts that a decoder writes one after another, to see whether memory grows


def run(visit: Visit, rows: Rows) -> None:
    """Measure the packed model, then the dense one, decoding in several ways."""
    name = "tiny" if visit.rehearsal else "llama-7b"
    sizes = [(1, 16)] if visit.rehearsal else [(1, PROMPT), *((batch, BATCHED_PROMPT) for batch in BATCHES)]
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "packed": lambda: packed_model(visit, name, MIXES[MIX]),
        "dense": lambda: dense_model(visit, name),
    }
    for kind, make in makers.items():
        model = make().eval()
        case = {"model": name, "weights": kind}
        rows.measure({**case, "what": "memory"}, partial(_memory, visit, model))
        for batch, prompt in sizes:
            for way in WAYS if batch == 1 else WAYS[:2]:  # a step of another batch takes a minute to compile
                work = {**case, "what": way, "batch": batch, "prompt": prompt}
                rows.measure(work, partial(_speed, visit, model, way, batch, prompt))
        rows.measure({**case, "what": "the same texts"}, partial(_texts, visit, model))
        rows.measure({**case, "what": "one text after another"}, partial(_again, visit, model))
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


def _speed(visit: Visit, model: PreTrainedModel, way: str, batch: int, prompt: int) -> dict[str, Any]:
    """Return seconds and tokens a second of the faster of two rounds after one to warm up."""
    new = 3 if visit.rehearsal else NEW
    tokens = _prompts(visit, model, batch, prompt)
    decoder = GraphDecoder(model)
    generate = decoder.generate if way == "graph" else cast("Any", model).generate
    rounds = [timed_round(generate, tokens, new, way == "static cache") for _ in range(2 if visit.rehearsal else 3)][1:]
    prefill, decode = (min(each[key] for each in rounds) for key in ("prefill_seconds", "decode_seconds"))
    return {
        "prompt_tokens": batch * prompt,
        "prefill_seconds": prefill,
        "new_tokens": batch * new,
        "decode_tokens_per_second": batch * (new - 1) / decode,
        "captured": decoder.captured,
        "predicted_decode_tokens_per_second": 1 / _predicted(visit, model) if batch == 1 and way == "graph" else None,
    }


def _predicted(visit: Visit, model: Any) -> float:
    """Return the predicted seconds of decoding a token with a captured graph."""
    block = model.model.layers[0]
    if isinstance(block.mlp.down_proj, nn.Linear):
        weights = sum(linear.weight.nbytes for linear in block.modules() if isinstance(linear, nn.Linear))
        products = [weights / BYTES_A_SECOND]
    else:
        products = [predict_layer(visit, layer, MIXES[MIX]) for layer in layers(visit, ["llama-7b"])]
    return predict_step(products, model.config.num_hidden_layers, model.lm_head.weight.nbytes)


def _prompts(visit: Visit, model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Return random tokens `[batch, length]`."""
    return torch.randint(1, int(cast("Any", model.config).vocab_size), (batch, length), device=visit.device)


def _texts(visit: Visit, model: Any) -> dict[str, Any]:
    """Compare the texts of a graph with those of `generate`, greedy and drawn, of prompts padded on the left."""
    prompts = _prompts(visit, model, 3, 16)
    mask = torch.ones_like(prompts)
    mask[0, :7] = mask[1, :2] = 0
    new = 3 if visit.rehearsal else 32
    found: dict[str, Any] = {}
    for name, sampling in (("greedy", {"do_sample": False}), ("drawn", {"do_sample": True, "top_k": 50})):
        texts = []
        for generate in (model.generate, GraphDecoder(model).generate):
            torch.manual_seed(0)
            given: dict[str, Any] = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": new, **sampling}
            texts.append(generate(**given, pad_token_id=0, eos_token_id=NO_TOKEN)[:, prompts.shape[1] :])
        found[name] = [int((one == other).int().cumprod(0).sum()) for one, other in zip(*texts, strict=True)]
    return {"new_tokens": new, "same_until": found}


def _again(visit: Visit, model: PreTrainedModel) -> dict[str, Any]:
    """Write texts one after another with one decoder, and return the memory that each of them left behind."""
    decoder, prompts = GraphDecoder(model), _prompts(visit, model, 1, 32)
    texts, allocated = [], []
    for _ in range(2 if visit.rehearsal else AGAIN):
        new = decoder.generate(input_ids=prompts, max_new_tokens=8, do_sample=False, eos_token_id=NO_TOKEN)
        texts.append(new)
        gc.collect()
        allocated.append(torch.cuda.memory_allocated(visit.device) if visit.device.type == "cuda" else 0)
    if not all(torch.equal(text, texts[0]) for text in texts):
        raise RuntimeError("the same prompt gave another text")
    return {"texts": len(texts), "allocated_bytes": allocated, "grown_bytes": allocated[-1] - allocated[1]}


@torch.no_grad()
def _logits(visit: Visit, model: PreTrainedModel) -> dict[str, Any]:
    """Return how far the logits of the kernels are from those of dequantized layers, into which the model is turned."""
    tokens = torch.randint(int(cast("Any", model.config).vocab_size), (1, 8), device=visit.device)
    packed: Tensor = cast("Any", model)(tokens).logits
    exact: Tensor = cast("Any", dequantize(model, torch.bfloat16))(tokens).logits
    agree = float((packed.argmax(-1) == exact.argmax(-1)).float().mean())
    return {"relative_error": relative_error(packed, exact.double()), "same_top_token": agree}
