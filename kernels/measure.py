"""Packed weights of random words, and the time a product with them takes on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimplus.format.affine import group_count
from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.kernels.dequantize import dequantize
from slimplus.kernels.fused import FusedShape, fuse_shards, split_shards
from slimplus.kernels.launch import LaunchConfig
from slimplus.kernels.packed_matmul import packed_matmul

Timer = Callable[[Sequence[Callable[[], Tensor]]], float]
"""Calls, each on weights of its own → seconds a call."""

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class RandomWeights:
    """Weights that read the same input, all of the same mix of widths."""

    bit_counts: BitCounts
    fused: dict[str, Tensor]
    shape: FusedShape
    counters: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self.fused.values())

    def multiply(self, inputs: Tensor, launch: LaunchConfig | None = None) -> Tensor:
        """The kernel's product, `[tokens, columns]`."""
        return packed_matmul(inputs, self.fused, self.shape, self.counters, launch=launch)

    def dequantize(self, dtype: torch.dtype) -> list[Tensor]:
        """Each weight, `[out, in]`."""
        shape, counts = self.shape, [self.bit_counts] * len(self.shape.out_features)
        return [
            dequantize(shard, self.bit_counts, rows, shape.in_features, shape.group_size, dtype)
            for shard, rows in zip(
                split_shards(self.fused, counts, shape.out_features, shape.group_size), shape.out_features, strict=True
            )
        ]

    def exact(self, inputs: Tensor) -> Tensor:
        """The product in float64."""
        return torch.cat([inputs.double() @ weight.double().T for weight in self.dequantize(torch.float32)], dim=1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """By the Euclidean norms; NaN if there is one in the result."""
    return float(torch.linalg.norm(result.double() - exact) / torch.linalg.norm(exact))


def random_weights(
    out_features: Sequence[int], in_features: int, group_size: int, mix: Sequence[int], device: torch.device
) -> RandomWeights:
    """Weights whose groups have the widths of `mix` in turn; all words are random, so all bits are used."""
    groups = group_count(in_features, group_size)
    widths = [mix[group % len(mix)] for group in range(groups)]
    counts = {width: widths.count(width) for width in sorted(set(widths))}
    shards = [_random_shard(rows, counts, group_size, device) for rows in out_features]
    fused, shape = fuse_shards(shards, [counts] * len(shards), out_features, in_features, group_size)
    return RandomWeights(counts, fused, shape, torch.zeros(shape.counters, dtype=torch.int32, device=device))


def _random_shard(rows: int, counts: BitCounts, group_size: int, device: torch.device) -> dict[str, Tensor]:
    shard = {}
    for name, (shape, dtype) in packed_shapes(rows, counts, group_size).items():
        if name == "scales":
            shard[name] = (0.01 + 0.01 * torch.rand(shape, device=device)).to(dtype)
        elif name == "group_index":
            shard[name] = torch.randperm(shape[0], device=device).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            shard[name] = torch.randint(limits.min, limits.max + 1, shape, dtype=torch.int64, device=device).to(dtype)
    return shard


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes must take turns so that none is still in the L2 cache when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + -(-2 * cache // size)


def product_calls(weights: Sequence[RandomWeights], inputs: Tensor, launch: LaunchConfig) -> list[Callable[[], Tensor]]:
    """A call for each of the weights."""
    return [partial(each.multiply, inputs, launch) for each in weights]


def graph_seconds(calls: Sequence[Callable[[], Tensor]], replays: int = 20) -> float:
    """Median seconds a call, all of them in turn in a CUDA graph: no launch overhead of Python is in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    return statistics.median(seconds)
