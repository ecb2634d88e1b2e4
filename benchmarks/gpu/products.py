"""Products of LLaMA-7B and 70B with the launches of the visit, beside cuBLAS and gemlite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import read_ceilings
from benchmarks.gpu.machine import Visit, spread
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import Layer, default, describe_product, layers, make_weights, mixes
from benchmarks.gpu.tuning import tuned
from benchmarks.kernels import GROUP_SIZE, dense_weights, gemlite_layers, linear_call, module_call, product_call
from slimplus.kernels.launch import bucket, shape_key
from slimplus.kernels.measure import RandomWeights, relative_error
from slimplus.kernels.packed_matmul import MAX_TOKENS

MODELS = ("llama-7b", "llama-70b")
TOKENS = (1, 4, 16, 64, 256, 257, 512, 2048)
REHEARSED_TOKENS = (1, 257)


def run(visit: Visit, rows: Rows) -> None:
    """Measure every layer, mix and number of tokens; the smaller model first."""
    for layer in layers(visit, MODELS)[:2] if visit.rehearsal else layers(visit, MODELS):
        shape = (layer.out_features, layer.in_features)
        dense = dense_weights(shape, visit.device)
        for tokens in REHEARSED_TOKENS if visit.rehearsal else TOKENS:
            inputs = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=visit.device)
            rows.measure(layer.case(bits="cuBLAS", tokens=tokens), partial(_cublas, visit, dense, inputs))
        del dense
        for mix, widths in mixes(visit).items():
            weights = make_weights(visit, layer, widths)
            gemlite = gemlite_layers(shape, widths, visit.device)
            for tokens in REHEARSED_TOKENS if visit.rehearsal else TOKENS:
                inputs = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=visit.device)
                rows.measure(layer.case(bits=mix, tokens=tokens), partial(_packed, visit, layer, weights, inputs))
                if gemlite:
                    case = layer.case(bits=f"gemlite {mix}", tokens=tokens)
                    rows.measure(case, partial(_gemlite, visit, gemlite, inputs))
            del weights, gemlite


def _packed(visit: Visit, layer: Layer, weights: Sequence[RandomWeights], inputs: Tensor) -> dict[str, Any]:
    """Return the row of a packed product: by the kernel, or beyond its tokens with a dequantized weight."""
    first, tokens = weights[0], len(inputs)
    if tokens <= MAX_TOKENS:
        known = tuned(visit, shape_key(layer.out_features, layer.in_features, GROUP_SIZE), bucket(tokens))
        launch = known or default(visit, first, tokens, inputs.dtype)
        return describe_product(visit, weights, inputs, launch, read_ceilings(visit)) | {"tuned": known is not None}
    error = relative_error(product_call(first, inputs)(), first.exact(inputs))
    calls: list[Callable[[], Tensor]] = [product_call(each, inputs) for each in weights]
    return {"launch": None, "relative_error": error, "bytes": first.size, "seconds": spread(visit.times(calls))}


def _cublas(visit: Visit, dense: Sequence[Tensor], inputs: Tensor) -> dict[str, Any]:
    calls = [linear_call(weight, inputs) for weight in dense]
    return {"bytes": dense[0].nbytes, "seconds": spread(visit.times(calls))}


def _gemlite(visit: Visit, modules: Sequence[Any], inputs: Tensor) -> dict[str, Any]:
    calls = [module_call(module, inputs.half()) for module in modules]
    return {"seconds": spread(visit.times(calls))}
