"""The cost model put to the test: splits around the programs that fit the GPU, and all products of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import read_ceilings
from benchmarks.gpu.machine import Visit, launch_facts, spread
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import default, describe_product, layers, make_weights, mixes
from slimplus.kernels.launch import LaunchConfig, blocks
from slimplus.kernels.measure import RandomWeights

MIXES = ("2 (1/2/3)", "2", "3")
MODEL = "llama-7b"


def run(visit: Visit, rows: Rows) -> None:
    """Measure every layer of LLaMA-7B with several splits, and all layers of a block one after another."""
    ceilings = read_ceilings(visit)
    chosen = mixes(visit, MIXES)
    for mix, widths in chosen.items():
        block = [make_weights(visit, layer, widths) for layer in layers(visit, [MODEL])]
        rows.measure({"model": MODEL, "layer": "block", "bits": mix}, partial(_block, visit, block))
        for layer, weights in zip(layers(visit, [MODEL]), block, strict=True):
            inputs = torch.randn(1, layer.in_features, dtype=torch.bfloat16, device=visit.device)
            for launch in _splits(visit, weights[0], inputs):
                rows.measure(
                    layer.case(bits=mix, tokens=1, split_k=launch.split_k),
                    partial(describe_product, visit, weights, inputs, launch, ceilings),
                )
        del block


def _splits(visit: Visit, weights: RandomWeights, inputs: Tensor) -> list[LaunchConfig]:
    """Return the default launch with the splits around the one that fills the GPU."""
    launch = default(visit, weights, 1, inputs.dtype)
    shape = weights.shape
    slots = launch_facts(visit, weights, inputs, launch)["slots"]
    full = slots // blocks(launch, shape.out_features, 1)
    groups = -(-shape.in_features // shape.group_size)
    wanted = {1, 2} if visit.rehearsal else {1, full // 2, full - 1, full, full + 1, full + 2, launch.split_k}
    return [replace(launch, split_k=split) for split in sorted(wanted) if 1 <= split <= groups]


def _block(visit: Visit, block: Sequence[Sequence[RandomWeights]]) -> dict[str, Any]:
    """Return the seconds of a block's products, each of which reads what the one before has written."""
    if any(one[0].shape.columns < other[0].shape.in_features for one, other in pairwise(block)):
        raise ValueError("a layer of the block reads more columns than the one before writes")
    repetitions = min(len(weights) for weights in block)
    size = max(each[0].shape.in_features for each in block)
    hidden = torch.randn(1, size, dtype=torch.bfloat16, device=visit.device)

    def chain(turn: int) -> Tensor:
        values = hidden
        for weights in block:
            values = weights[turn].multiply(values[:, : weights[turn].shape.in_features])
        return values

    calls: list[Callable[[], Tensor]] = [partial(chain, turn) for turn in range(repetitions)]
    return {"seconds": spread(visit.times(calls)), "bytes": sum(weights[0].size for weights in block)}
