"""Operators around the product: compiled, captured in a graph, in vLLM; the packed head and embedding."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cost_model import predict_lookup
from benchmarks.gpu.machine import Visit, spread
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import Layer, predict_layer
from benchmarks.kernels import GROUP_SIZE
from slimplus.kernels.measure import random_layer, relative_error, without_collection
from slimplus.nn import PackedLinear
from slimplus.nn.backends.triton import TritonWeight
from slimplus.nn.packed_embedding import PackedEmbedding

REPLAYS = 1000
HEAD = (32000, 4096)
REHEARSED_HEAD = (32, 128)


def run(visit: Visit, rows: Rows) -> None:
    """Measure the operators."""
    weight = _weight(visit)
    for tokens in (1,) if visit.rehearsal else (1, 4, 16):
        inputs = torch.randn(tokens, weight.in_features, dtype=torch.bfloat16, device=visit.device)
        rows.measure({"what": "compiled", "tokens": tokens}, partial(_compiled, visit, weight, inputs))
        rows.measure({"what": "replayed", "tokens": tokens}, partial(_replayed, visit, weight, inputs))
    rows.measure({"what": "vLLM's operator in a graph"}, partial(_vllm, visit))
    for bits, tokens in product((4, 8), (1,) if visit.rehearsal else (1, 16)):
        rows.measure({"what": "head", "bits": bits, "tokens": tokens}, partial(_head, visit, bits, tokens))
        rows.measure({"what": "embedding", "bits": bits, "tokens": tokens}, partial(_embedding, visit, bits, tokens))


def _weight(visit: Visit) -> TritonWeight:
    """Return q, k and v of LLaMA-7B with random integers of 1 to 3 bits; small ones in a rehearsal."""
    rows, columns = ((32, 16, 16), 256) if visit.rehearsal else ((4096, 4096, 4096), 4096)
    groups = columns // GROUP_SIZE
    counts = {1: groups // 4, 2: groups - 2 * (groups // 4), 3: groups // 4} if groups >= 4 else {1: 1, 3: 1}
    tensors = [random_layer(each, counts, GROUP_SIZE, visit.device) for each in rows]
    shapes = [(each, columns) for each in rows]
    weight, _ = TritonWeight.from_packed(tensors, [counts] * len(rows), shapes, GROUP_SIZE, None)
    return weight


def _compiled(visit: Visit, weight: TritonWeight, inputs: Tensor) -> dict[str, Any]:
    """Compare the product in a compiled function, in CUDA graphs of torch.compile, with the product itself."""
    options: dict[str, Any] = {"backend": "aot_eager"} if visit.rehearsal else {"mode": "reduce-overhead"}

    def doubled(values: Tensor) -> Tensor:
        return weight.linear(values * 2)

    compiled: Any = torch.compile(doubled, **options)
    expected = weight.linear(inputs * 2)
    equal = all(torch.equal(compiled(inputs).clone(), expected) for _ in range(2 if visit.rehearsal else 10))
    if not equal:
        raise RuntimeError("the compiled product has other bits")
    return {"equal": equal, "seconds": spread(visit.times([lambda: weight.linear(inputs)]))}


def _replayed(visit: Visit, weight: TritonWeight, inputs: Tensor) -> dict[str, Any]:
    """Compare the results of a graph's replays, bit for bit."""
    expected = weight.linear(inputs)
    replay = _capture(visit, lambda: weight.linear(inputs))
    count = 2 if visit.rehearsal else REPLAYS
    equal = sum(torch.equal(replay(), expected) for _ in range(count))
    if equal != count:
        raise RuntimeError(f"{count - equal} of {count} replays gave other bits")
    return {"replays": count}


def _capture(visit: Visit, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that replays a call from a CUDA graph; in a rehearsal the call itself."""
    if visit.rehearsal:
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _vllm(visit: Visit) -> dict[str, Any]:
    """Capture what vLLM's operator calls, if vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    from slimplus.hub.engine_layers import PackedLinears

    counts = {1: 8, 2: 16, 3: 8}
    layers = [
        PackedLinear.from_tensors(random_layer(rows, counts, GROUP_SIZE, visit.device), 4096, rows, GROUP_SIZE)
        for rows in (4096, 1024, 1024)
    ]
    packed = PackedLinears(layers, torch.bfloat16)
    inputs = torch.randn(8, 4096, dtype=torch.bfloat16, device=visit.device)
    expected = packed(inputs)
    replay = _capture(visit, lambda: packed(inputs))
    return {"equal": torch.equal(replay(), expected), "seconds": spread(visit.times([lambda: packed(inputs)]))}


def _head(visit: Visit, bits: int, tokens: int) -> dict[str, Any]:
    """Time a packed output head."""
    rows, columns = REHEARSED_HEAD if visit.rehearsal else HEAD
    counts = {bits: columns // GROUP_SIZE}
    tensors = random_layer(rows, counts, GROUP_SIZE, visit.device)
    weight, _ = TritonWeight.from_packed([tensors], [counts], [(rows, columns)], GROUP_SIZE, None)
    head = PackedLinear.from_tensors(tensors, columns, rows, GROUP_SIZE)
    inputs = torch.randn(tokens, columns, dtype=torch.bfloat16, device=visit.device)
    exact = inputs.double() @ head.dequantize().double().T
    seconds = spread(visit.times([lambda: weight.linear(inputs)]))
    layer = Layer("head", "head", (rows,), columns)
    predicted = predict_layer(visit, layer, (bits,)) if tokens == 1 else None
    error = relative_error(weight.linear(inputs), exact)
    return {"relative_error": error, "seconds": seconds, "predicted": {"total": predicted}}


def _embedding(visit: Visit, bits: int, tokens: int) -> dict[str, Any]:
    """Time the lookup of tokens in a packed embedding."""
    rows, columns = REHEARSED_HEAD if visit.rehearsal else HEAD
    counts = {bits: columns // GROUP_SIZE}
    with torch.device("meta"):
        embedding = PackedEmbedding(rows, columns, GROUP_SIZE, counts, torch.bfloat16)
    embedding.load_state_dict(random_layer(rows, counts, GROUP_SIZE, visit.device), assign=True)
    chosen = torch.randint(rows, (tokens,), device=visit.device)
    found, expected = embedding._launch(chosen), embedding.dequantize(torch.bfloat16)[chosen]
    # The interpreter of a rehearsal cuts off what a GPU rounds.
    if not (torch.allclose(found, expected, rtol=2**-7) if visit.rehearsal else torch.equal(found, expected)):
        raise RuntimeError("the lookup differs from the dequantized rows")
    return {
        "seconds": spread(visit.times([lambda: embedding._launch(chosen)])),
        "predicted": {"total": predict_lookup() if tokens == 1 else None},
    }
