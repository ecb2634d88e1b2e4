"""A packed linear layer on the CPU against dense ones, in the same run.

    python benchmarks/cpu_linear.py [--features 4096] [--rows 1 4 16 64 256 1024] [--threads 2]

Several layers take turns, more than a cache holds, as in a model. The rounds of packed and dense layers alternate, and
the median of each is kept. Prints a table of milliseconds and ratios, and writes benchmarks/results/cpu_linear.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, storable_scale, storable_zero_point
from slimplus.nn import PackedLinear, prepare_inference
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine

RESULT = Path(__file__).resolve().parent / "results" / "cpu_linear.json"
GROUP_SIZE = 128
WIDTHS = (1, 2, 2, 3)  # widths of the groups, in turn: 2 bits on average
LAYERS = 6
ROUNDS = 15
DENSE = {"dense float32": torch.float32, "dense bfloat16": torch.bfloat16}

Layers = dict[str, tuple[list[nn.Module], torch.dtype]]
"""Name → layers of one kind, and the dtype of their input."""


def main() -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--features", type=int, default=4096, help="rows and columns of the layers")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256, 512, 1024], help="rows of the input"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packed = [packed_layer(arguments.features, seed) for seed in range(LAYERS)]
    layers, memory = prepare_layers(packed)
    with torch.inference_mode():
        milliseconds = {rows: measure(layers, rows, arguments.features) for rows in arguments.rows}
    sys.stdout.write(table(milliseconds, memory) + "\n")
    result = {
        "machine": describe_machine() | {"threads": arguments.threads},
        "features": arguments.features,
        "group_size": GROUP_SIZE,
        "average_bits": statistics.mean(WIDTHS),
        "bits_per_weight_in_memory": memory,
        "milliseconds": milliseconds,
        "speedup_at_one_row": {name: milliseconds[1][name] / milliseconds[1]["packed"] for name in DENSE}
        if 1 in milliseconds
        else None,
    }
    write_atomic(arguments.output, json.dumps(result, indent=2) + "\n")


def packed_layer(features: int, seed: int) -> PackedLinear:
    """Return a random layer of 2 bits on average."""
    generator = torch.Generator().manual_seed(seed)
    groups = features // GROUP_SIZE
    bits = torch.tensor(list(itertools.islice(itertools.cycle(WIDTHS), groups)), dtype=torch.int32)
    levels = (2**bits).repeat_interleave(GROUP_SIZE)
    integers = (torch.rand(features, features, generator=generator) * levels).to(torch.uint8)
    scale = storable_scale(torch.rand(features, groups, generator=generator) * 0.02 + 0.01)
    zero_point = storable_zero_point(torch.rand(features, groups, generator=generator) * 2**bits, bits)
    return PackedLinear.from_quantized(QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE), None)


def prepare_layers(packed: list[PackedLinear]) -> tuple[Layers, dict[str, float]]:
    """Return the layers to measure, dense ones made from the packed ones, and the bits that a weight takes in memory.

    Both are by name: `packed`, and the names in `DENSE`.
    """
    weights = packed[0].in_features * packed[0].out_features
    stored = 8 * sum(tensor.nbytes for tensor in packed[0].packed_tensors().values()) / weights
    layers: Layers = {}
    memory = {"packed": stored}
    for name, dtype in DENSE.items():
        layers[name] = ([layer.to_linear().to(dtype) for layer in packed], dtype)
        memory[name] = 8.0 * dtype.itemsize
    for fused in prepare_inference(nn.ModuleList([nn.Sequential(layer) for layer in packed])):
        fused.prepare()
        memory["packed"] = stored + 8 * fused.nbytes / weights
    layers["packed"] = (list(packed), torch.bfloat16)
    return layers, memory


def measure(layers: Layers, rows: int, features: int) -> dict[str, float]:
    """Return the milliseconds that one layer takes for an input of `rows`, by name."""
    inputs = torch.randn(1, rows, features)
    calls = {
        name: itertools.cycle([_call(layer, inputs.to(dtype)) for layer in members])
        for name, (members, dtype) in layers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, turns in calls.items():
            start = time.perf_counter()
            for _ in range(LAYERS):
                next(turns)()
            seconds[name].append((time.perf_counter() - start) / LAYERS)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def _call(layer: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(inputs)


def table(milliseconds: dict[int, dict[str, float]], memory: dict[str, float]) -> str:
    """Return a Markdown table; the ratios say how many times faster the packed layer is."""
    names = [*DENSE, "packed"]
    head = [f"{name} ({memory[name]:.2f} bits)" for name in names]
    lines = [f"| rows | {' | '.join(head)} | over float32 | over bfloat16 |", "|---" * (len(names) + 3) + "|"]
    for rows, times in milliseconds.items():
        cells = [f"{times[name]:.2f} ms" for name in names] + [f"{times[name] / times['packed']:.2f}" for name in DENSE]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
