"""Products with packed weights on a GPU, against cuBLAS in bfloat16 and against gemlite if it is installed.

    python benchmarks/kernels.py [--models llama-7b llama-70b] [--tokens 1 4 16 64 256 2048]

Every product is checked against float64 on fresh random inputs before it is timed. Weights take turns, so that none of
them is in the L2 cache when it is used, and calls are replayed from a CUDA graph, so that the times hold no overhead of
Python. Bandwidths are compared with that of a copy, measured in the same run. Writes
benchmarks/results/kernels_<gpu>.json with the machine, the versions and the commit, and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slimplus.kernels.launch import bucket, table_file
from slimplus.kernels.measure import (
    TOLERANCE,
    RandomWeights,
    Timer,
    copies_beyond_cache,
    graph_seconds,
    random_weights,
    relative_error,
)
from slimplus.kernels.packed_matmul import MAX_TOKENS, choose_launch
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, package_version

ROOT = Path(__file__).resolve().parent.parent
GROUP_SIZE = 128
DTYPE = torch.bfloat16
MODELS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "llama-7b": {
        "qkv": ((4096, 4096, 4096), 4096),
        "o": ((4096,), 4096),
        "gate_up": ((11008, 11008), 4096),
        "down": ((4096,), 11008),
    },
    "llama-70b": {
        "qkv": ((8192, 1024, 1024), 8192),
        "o": ((8192,), 8192),
        "gate_up": ((28672, 28672), 8192),
        "down": ((8192,), 28672),
    },
}
"""Model → layer → rows of each of the weights that read the same input, and their columns."""

MIXES = {"2": (2,), "2 (1/2/3)": (1, 2, 2, 3), "3": (3,), "3 (2/3/4)": (2, 3, 3, 4), "4": (4,)}
"""Average bits → widths of the groups, in turn."""

TOKENS = (1, 4, 16, 64, 256, 2048)
GEMLITE_BITS = (2, 4)


def main() -> None:
    """Parse the arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: these kernels can only be measured on one")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = measure([(model, layer) for model in arguments.models for layer in MODELS[model]], arguments.tokens, device)
    gpu = torch.cuda.get_device_name(device)
    result = {"gpu": gpu, "copy_bandwidth": copy_bandwidth(device), **provenance(), "rows": rows}
    write_atomic(table_file(ROOT / "benchmarks/results", f"kernels {gpu}"), json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result) + "\n")


def measure(
    layers: Sequence[tuple[str, str]], tokens: Sequence[int], device: torch.device, timer: Timer = graph_seconds
) -> list[dict[str, Any]]:
    """Return a row for each layer, mix of widths and number of tokens.

    Args:
        layers: models and their layers, as in `MODELS`.
        tokens: numbers of input rows.
        device: the GPU.
        timer: measurement of the mean seconds of a call.
    """
    rows = []
    for model, layer in tqdm(layers):
        shape = MODELS[model][layer]
        dense = dense_weights(shape, device)
        for mix, widths in MIXES.items():
            weights = packed_weights(shape, widths, device)
            gemlite = gemlite_layers(shape, widths, device)
            for count in tokens:
                inputs = torch.randn(count, shape[1], dtype=DTYPE, device=device)
                _check(weights[0], inputs)
                seconds = {
                    "slimplus": timer([product_call(each, inputs) for each in weights]),
                    "cublas": timer([linear_call(weight, inputs) for weight in dense]),
                    "gemlite": timer([module_call(each, inputs.half()) for each in gemlite]) if gemlite else None,
                }
                rows.append({"model": model, "layer": layer, "shape": shape, "bits": mix, "tokens": count})
                rows[-1] |= {"bytes": weights[0].size, "launch": _launch(weights[0], count, device), "seconds": seconds}
    return rows


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: times, speed-up over cuBLAS, and bandwidth as a part of a copy's bandwidth."""
    lines = [
        "| model | layer | bits | tokens | slimplus µs | cuBLAS µs | gemlite µs | speed-up | of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        times = (f"{value * 1e6:.1f}" if value else "" for value in seconds.values())
        speedup = seconds["cublas"] / seconds["slimplus"]
        bandwidth = row["bytes"] / seconds["slimplus"] / result["copy_bandwidth"]
        cells = (row["model"], row["layer"], row["bits"], row["tokens"], *times, f"{speedup:.2f}", f"{bandwidth:.0%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def copy_bandwidth(device: torch.device, timer: Timer = graph_seconds, size: int = 1 << 30) -> float:
    """Return the bytes a second, read and written, of a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timer([lambda: target.copy_(source)])


def provenance() -> dict[str, Any]:
    """Return the machine with versions and commit, and the settings that all rows share."""
    machine = describe_machine() | {"gemlite": package_version("gemlite")}
    return {"machine": machine, "group_size": GROUP_SIZE, "dtype": str(DTYPE)}


def packed_weights(
    shape: tuple[tuple[int, ...], int], widths: Sequence[int], device: torch.device
) -> list[RandomWeights]:
    """Return random packed weights of a shape, more than the cache holds."""
    first = random_weights(*shape, GROUP_SIZE, widths, device)
    copies = copies_beyond_cache(first.size, device)
    return [first, *(random_weights(*shape, GROUP_SIZE, widths, device) for _ in range(copies - 1))]


def dense_weights(shape: tuple[tuple[int, ...], int], device: torch.device) -> list[Tensor]:
    """Return random dense weights of a shape, more than the cache holds."""
    rows = sum(shape[0])
    copies = copies_beyond_cache(rows * shape[1] * DTYPE.itemsize, device)
    return [torch.randn(rows, shape[1], dtype=DTYPE, device=device) for _ in range(copies)]


def gemlite_layers(shape: tuple[tuple[int, ...], int], widths: Sequence[int], device: torch.device) -> list[Any]:
    """Return layers of gemlite of a shape; none if gemlite is not installed or does not have the widths."""
    if not importlib.util.find_spec("gemlite") or len(widths) > 1 or widths[0] not in GEMLITE_BITS:
        return []
    from gemlite.core import DType, GemLiteLinear

    rows, columns = sum(shape[0]), shape[1]
    layers = []
    for _ in range(copies_beyond_cache(rows * columns * widths[0] // 8, device)):
        layer = GemLiteLinear(widths[0], GROUP_SIZE, columns, rows, DType.FP16, DType.FP16)
        integers = torch.randint(2 ** widths[0], (rows, columns), dtype=torch.uint8, device=device)
        scales = torch.rand(rows * columns // GROUP_SIZE, 1, dtype=torch.float16, device=device)
        layer.pack(integers, scales, torch.ones_like(scales), None)
        layers.append(layer)
    return layers


def _check(weights: RandomWeights, inputs: Tensor) -> None:
    """Check a product against float64."""
    error = relative_error(product_call(weights, inputs)(), weights.exact(inputs))
    if not error <= TOLERANCE[inputs.dtype]:
        raise RuntimeError(f"wrong product of {len(inputs)} tokens with {weights.shape}: relative error {error:.1e}")


def product_call(weights: RandomWeights, inputs: Tensor) -> Callable[[], Tensor]:
    """Return the product that a packed layer takes: the kernel for few tokens, else cuBLAS with dequantized weights."""
    if len(inputs) <= MAX_TOKENS:
        return lambda: weights.multiply(inputs)
    return lambda: weights.dequantized_product(inputs)


def linear_call(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
    """Return the product with a dense weight `[out, in]`."""
    return lambda: torch.nn.functional.linear(inputs, weight)


def module_call(layer: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], Tensor]:
    """Return the product that a module computes."""
    return lambda: layer(inputs)


def _launch(weights: RandomWeights, tokens: int, device: torch.device) -> dict[str, int] | None:
    """Return the launch configuration of the kernel, if it is used for so many tokens."""
    if tokens > MAX_TOKENS:
        return None
    return asdict(choose_launch(device, weights.shape, DTYPE, weights.fused["scales"].dtype, False, bucket(tokens)))


if __name__ == "__main__":
    main()
