"""Which launch of `packed_matmul` suits a GPU and a shape.

A GPU that was tuned (`python -m slimplus.kernels.tune`) has a table in `configs/`, by the name of the GPU; a shape that
is in it gets the fastest launch measured there. Every other gets a default of its compute capability, chosen for the
least instructions per weight in the compiled code and not measured: no table is shipped yet.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
BUCKETS = (8, 16, 32, 64, 128, 256)
"""Numbers of tokens up to which a launch was tuned."""

PROGRAMS_PER_MULTIPROCESSOR = 6  # what fits by registers; fewer leave it idle, more only add partial sums


@dataclass(frozen=True)
class LaunchConfig:
    """How a product is cut up.

    Attributes:
        block_n: rows of the weight a program.
        block_m: tokens a program.
        split_k: programs that share the groups of the same rows and tokens.
        num_warps: of a program.
        num_stages: groups in flight.
    """

    block_n: int
    block_m: int
    split_k: int
    num_warps: int
    num_stages: int


DEFAULTS = {
    8: LaunchConfig(128, 8, 0, 2, 3),
    16: LaunchConfig(64, 16, 0, 2, 3),
    32: LaunchConfig(64, 32, 0, 4, 3),
    64: LaunchConfig(64, 64, 0, 4, 3),
    128: LaunchConfig(64, 64, 0, 4, 3),
    256: LaunchConfig(64, 64, 0, 4, 3),
}
"""Bucket → launch whose `split_k` is chosen by the shape."""


def choose_launch(
    device: torch.device, out_features: Sequence[int], in_features: int, group_size: int, tokens: int
) -> LaunchConfig:
    """The launch for a product on `device`; on a CPU, under Triton's interpreter, a default one."""
    return _choose(device, tuple(out_features), in_features, group_size, bucket(tokens))


def bucket(tokens: int) -> int:
    """The smallest of BUCKETS that holds `tokens`."""
    return next(size for size in BUCKETS if tokens <= size)


def shape_key(out_features: Sequence[int], in_features: int, group_size: int) -> str:
    """How a table calls a shape."""
    return f"{sum(out_features)}x{in_features} g{group_size}"


def table_file(gpu: str, folder: Path = CONFIGS) -> Path:
    """Where the launches of a GPU lie."""
    return folder / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def read_table(file: Path) -> dict[str, Any]:
    """`{"launches": {shape: {bucket: launch}}, …}`; no file is an empty table."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"launches": {}}


def default_launch(
    out_features: Sequence[int], in_features: int, group_size: int, tokens: int, multiprocessors: int
) -> LaunchConfig:
    """A launch that fills the GPU, with at least two groups a program."""
    launch = DEFAULTS[bucket(tokens)]
    blocks = sum(-(-rows // launch.block_n) for rows in out_features) * -(-tokens // launch.block_m)
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // blocks)
    groups = -(-in_features // group_size)
    return LaunchConfig(
        launch.block_n, launch.block_m, max(1, min(wanted, groups // 2)), launch.num_warps, launch.num_stages
    )


@functools.cache
def _choose(
    device: torch.device, out_features: tuple[int, ...], in_features: int, group_size: int, tokens: int
) -> LaunchConfig:
    if device.type != "cuda":
        return default_launch(out_features, in_features, group_size, tokens, multiprocessors=1)
    properties = torch.cuda.get_device_properties(device)
    tuned = read_table(table_file(properties.name))["launches"].get(
        shape_key(out_features, in_features, group_size), {}
    )
    if str(tokens) in tuned:
        return LaunchConfig(**tuned[str(tokens)])
    return default_launch(out_features, in_features, group_size, tokens, properties.multi_processor_count)
