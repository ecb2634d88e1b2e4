"""Products with random packed weights, to check and time launches on a GPU."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimplus.format.affine import group_count
from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.kernels.dequantize import dequantize, dequantized_matmul
from slimplus.kernels.fused import FusedShape, fuse_layers, split_layers
from slimplus.kernels.launch import LaunchConfig
from slimplus.kernels.packed_matmul import packed_matmul

Timer = Callable[[Sequence[Callable[[], Tensor]]], float]
"""Function that returns the seconds a call takes, from calls that each read weights of their own."""

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # largest relative error of a product


@dataclass(frozen=True)
class RandomWeights:
    """Layers of random weights that read the same input, with the same mix of widths.

    Attributes:
        bit_counts: number of groups of each width in every layer.
        fused: tensors of the layers, from `fuse_layers`.
        shape: shape of the layers.
        counters: counters that a launch needs.
    """

    bit_counts: BitCounts
    fused: dict[str, Tensor]
    shape: FusedShape
    counters: Tensor

    @property
    def size(self) -> int:
        """Size of the tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.fused.values())

    def multiply(self, inputs: Tensor, launch: LaunchConfig | None = None) -> Tensor:
        """Return the kernel's product with `inputs` `[tokens, in]`, `[tokens, columns]`."""
        return packed_matmul(inputs, self.fused, self.shape, self.counters, launch=launch)

    def dequantize(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the weight of each layer, `[out, in]`."""
        shape, counts = self.shape, [self.bit_counts] * len(self.shape.out_features)
        return [
            dequantize(layer, self.bit_counts, rows, shape.in_features, shape.group_size, dtype)
            for layer, rows in zip(
                split_layers(self.fused, counts, shape.out_features, shape.group_size), shape.out_features, strict=True
            )
        ]

    def dequantized_product(self, inputs: Tensor) -> Tensor:
        """Return the product with `inputs` `[tokens, in]` by slices of dequantized weights, `[tokens, columns]`."""
        shape, counts = self.shape, [self.bit_counts] * len(self.shape.out_features)
        outputs = inputs.new_empty(len(inputs), shape.columns)
        parts = outputs.split(list(shape.out_features), dim=1)
        layers = split_layers(self.fused, counts, shape.out_features, shape.group_size)
        for layer, part in zip(layers, parts, strict=True):
            dequantized_matmul(inputs, layer, self.bit_counts, shape.group_size, part)
        return outputs

    def exact(self, inputs: Tensor) -> Tensor:
        """Return the product with `inputs` `[tokens, in]` in float64, `[tokens, columns]`."""
        return torch.cat([inputs.double() @ weight.double().T for weight in self.dequantize(torch.float32)], dim=1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the Euclidean norm of the error over that of `exact`; NaN if the result holds one."""
    return float(torch.linalg.norm(result.double() - exact) / torch.linalg.norm(exact))


def random_weights(
    out_features: Sequence[int],
    in_features: int,
    group_size: int,
    mix: Sequence[int],
    device: torch.device,
    scale_bits: int = 16,
) -> RandomWeights:
    """Return layers of random weights.

    Args:
        out_features: rows of each layer.
        in_features: columns of every layer.
        group_size: columns a group.
        mix: widths of the groups, in turn.
        device: device of the tensors.
        scale_bits: bits that a scale takes, 8 or 16.
    """
    groups = group_count(in_features, group_size)
    widths = [mix[group % len(mix)] for group in range(groups)]
    counts = {width: widths.count(width) for width in sorted(set(widths))}
    layers = [random_layer(rows, counts, group_size, device, scale_bits) for rows in out_features]
    fused, shape = fuse_layers(layers, [counts] * len(layers), out_features, in_features, group_size)
    return RandomWeights(counts, fused, shape, torch.zeros(shape.counters, dtype=torch.int32, device=device))


def random_layer(
    out_features: int, counts: BitCounts, group_size: int, device: torch.device, scale_bits: int = 16
) -> dict[str, Tensor]:
    """Return the packed tensors of a layer: all words are random, so that all bits are used.

    Args:
        out_features: rows of the layer.
        counts: number of groups of each width.
        group_size: columns a group.
        device: device of the tensors.
        scale_bits: bits that a scale takes, 8 or 16.
    """
    layer = {}
    for name, (shape, dtype) in packed_shapes(out_features, counts, group_size, scale_bits).items():
        if name == "scales" and scale_bits == 16:
            layer[name] = (0.01 + 0.01 * torch.rand(shape, device=device)).to(dtype)
        elif name == "group_index":
            layer[name] = torch.randperm(shape[0], device=device).to(dtype)
        elif name == "group_bits":
            widths = [width for width in sorted(counts) for _ in range(counts[width])]
            layer[name] = torch.tensor(widths, dtype=dtype, device=device)
        else:
            limits = torch.iinfo(dtype)
            layer[name] = torch.randint(limits.min, limits.max + 1, shape, dtype=torch.int64, device=device).to(dtype)
    if scale_bits == 8:
        layer["scales"][-1] = 8  # the exponents: scales from 2**-7 to 2**1
    return layer


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """Return how many weights of `size` bytes must take turns so that none is still in the L2 cache at its turn."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + -(-2 * cache // size)


def product_calls(weights: Sequence[RandomWeights], inputs: Tensor, launch: LaunchConfig) -> list[Callable[[], Tensor]]:
    """Return a call of the product with `inputs` for each of the weights."""
    return [partial(each.multiply, inputs, launch) for each in weights]


def graph_seconds(calls: Sequence[Callable[[], Tensor]], replays: int = 20) -> float:
    """Return the median seconds a call takes, all calls in turn in a CUDA graph, without Python's launch overhead."""
    return statistics.median(graph_times(calls, replays))


def graph_times(calls: Sequence[Callable[[], Tensor]], replays: int = 20) -> list[float]:
    """Return the seconds that a call takes in each replay of a CUDA graph that holds all calls in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # the first call compiles the kernel, which a graph cannot capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000 / len(calls))
    return seconds


@contextmanager
def without_collection() -> Iterator[None]:
    """Switch garbage collection off for a capture: it may unload a kernel, which CUDA forbids while it captures."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
