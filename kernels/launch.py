"""Choice of the launch of `packed_matmul` for a GPU and a shape.

`python -m slimplus.kernels.tune` measures launches on a GPU and writes the fastest of each shape into a table in
`configs/`, under the GPU's name. Shapes without an entry get a default launch. The defaults have not been measured:
tiles were chosen by the compiled code, for no spilled registers and the fewest instructions per weight, and the split
fills the programs that the GPU runs at the same time, by the registers of the compiled kernel. No table is shipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
BUCKETS = (8, 16, 32, 64, 128, 256)
"""Buckets of tokens: a launch serves all numbers of tokens up to its bucket's."""


@dataclass(frozen=True)
class LaunchConfig:
    """How a product is divided among programs.

    Attributes:
        block_n: rows of the weight that a program handles.
        block_m: tokens that a program handles.
        split_k: programs that share the groups of the same rows and tokens.
        num_warps: warps of a program.
        num_stages: groups that a program loads ahead.
    """

    block_n: int
    block_m: int
    split_k: int
    num_warps: int
    num_stages: int


_DECODE = {8: LaunchConfig(128, 8, 1, 2, 3), 16: LaunchConfig(128, 16, 1, 2, 3)}
_LARGE = LaunchConfig(64, 64, 1, 4, 3)
DEFAULTS = {
    80: _DECODE | {32: LaunchConfig(128, 32, 1, 4, 2), 256: _LARGE},
    90: _DECODE | {32: LaunchConfig(64, 32, 1, 4, 3), 64: _LARGE, 256: LaunchConfig(128, 128, 1, 8, 3)},
}
"""Default launch by compute capability (90 is 9.0) and largest number of tokens; `split_groups` gives `split_k`.

Programs of two warps decode with `mma.sync`. With four or more, Triton takes Hopper's `wgmma`, which occupies the
tensor cores as long for 8 tokens as for 64. Capabilities without an entry get that of 8.0.
"""


def bucket(tokens: int) -> int:
    """Return the smallest of `BUCKETS` that holds `tokens`."""
    return next(size for size in BUCKETS if tokens <= size)


def shape_key(out_features: Sequence[int], in_features: int, group_size: int) -> str:
    """Return the name of a shape in a table, such as `4096+1024+1024x4096 g128`."""
    return f"{'+'.join(map(str, out_features))}x{in_features} g{group_size}"


def table_file(folder: Path, gpu: str) -> Path:
    """Return the file of a GPU's table in a folder."""
    return folder / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def read_table(file: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Return the launches of a table by shape and bucket; none if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8"))["launches"] if file.is_file() else {}


def tuned_launch(
    gpu: str, out_features: Sequence[int], in_features: int, group_size: int, tokens: int
) -> LaunchConfig | None:
    """Return the launch of a GPU's table for a shape and a bucket of tokens, or None if it was not tuned."""
    launches = read_table(table_file(CONFIGS, gpu)).get(shape_key(out_features, in_features, group_size), {})
    return LaunchConfig(**launches[str(tokens)]) if str(tokens) in launches else None


def default_launch(capability: int, group_size: int, tokens: int) -> LaunchConfig:
    """Return the default launch of a compute capability; its programs do not share groups, see `split_groups`.

    Args:
        capability: compute capability of the GPU, 90 for 9.0.
        group_size: columns a group.
        tokens: rows of the inputs.
    """
    defaults = DEFAULTS.get(capability, DEFAULTS[80])
    launch = defaults[next(most for most in defaults if tokens <= most)]
    if group_size > 128:  # larger tiles overflow the registers or the shared memory then
        return replace(launch if launch.block_m <= _LARGE.block_m else _LARGE, block_n=64)
    return launch


def split_groups(
    launch: LaunchConfig, out_features: Sequence[int], in_features: int, group_size: int, tokens: int, slots: int
) -> LaunchConfig:
    """Return the launch with so many programs for the same rows that all of them run at the same time.

    One program more than there are slots would wait for others to end, and the product with it. Every program keeps
    two groups, since it pays for its start and its sums whatever it multiplies.

    Args:
        launch: the launch, whose `split_k` is replaced.
        out_features: rows of each layer.
        in_features: columns of every layer.
        group_size: columns a group.
        tokens: rows of the inputs.
        slots: programs that the GPU runs at the same time.
    """
    groups = -(-in_features // group_size)
    return replace(launch, split_k=max(1, min(slots // blocks(launch, out_features, tokens), groups // 2)))


def blocks(launch: LaunchConfig, out_features: Sequence[int], tokens: int) -> int:
    """Return the number of blocks of the output, each of some rows of one layer and some tokens."""
    return sum(-(-rows // launch.block_n) for rows in out_features) * -(-tokens // launch.block_m)
