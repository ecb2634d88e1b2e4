"""The fastest launch of every layer and bucket of tokens, and the GPU's table of launches."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.ceilings import read_ceilings
from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import describe_product, layers, make_weights
from benchmarks.kernels import GROUP_SIZE, MIXES
from slimplus.kernels.launch import LaunchConfig, read_table, shape_key, table_file
from slimplus.kernels.packed_matmul import count_slots
from slimplus.kernels.tune import candidates, write_table

MIX = "2 (1/2/3)"
BUCKETS = (8, 16, 256, 64, 32, 128)
"""Buckets of tokens, the ones that matter most first."""


def run(visit: Visit, rows: Rows) -> None:
    """Measure the candidates of every bucket and layer, and write the table after each."""
    ceilings = read_ceilings(visit)
    for bucket in BUCKETS[:1] if visit.rehearsal else BUCKETS:
        for layer in layers(visit)[:1] if visit.rehearsal else layers(visit):
            weights = make_weights(visit, layer, MIXES[MIX])
            inputs = torch.randn(bucket, layer.in_features, dtype=torch.bfloat16, device=visit.device)
            scales = weights[0].fused["scales"].dtype
            slots = partial(count_slots, visit.device, weights[0].shape, inputs.dtype, scales, False)
            found = [
                rows.measure(
                    layer.case(bits=MIX, tokens=bucket, candidate=asdict(launch)),
                    partial(describe_product, visit, weights, inputs, launch, ceilings),
                )
                for launch in candidates(bucket, weights[0].shape, slots)
            ]
            timed = [row for row in found if "failure" not in row]
            if timed:
                best = min(timed, key=lambda row: row["seconds"]["median"])["launch"]
                _keep(visit, shape_key(layer.out_features, layer.in_features, GROUP_SIZE), bucket, best)


def _keep(visit: Visit, shape: str, bucket: int, launch: dict[str, int]) -> None:
    """Write the launch of a shape and bucket into the table of this visit."""
    known = tuned_launches(visit).get(shape, {})
    write_table(visit.folder, visit.gpu, {shape: known | {str(bucket): launch}})


def tuned_launches(visit: Visit) -> dict[str, dict[str, Any]]:
    """Return the launches of this visit's table by shape and bucket."""
    return read_table(table_file(visit.folder, visit.gpu))


def tuned(visit: Visit, shape: str, bucket: int) -> LaunchConfig | None:
    """Return the launch of this visit's table for a shape and bucket, or None if it was not tuned."""
    found = tuned_launches(visit).get(shape, {}).get(str(bucket))
    return LaunchConfig(**found) if found else None
