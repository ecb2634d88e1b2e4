"""Choice of the launch of `packed_matmul` for a GPU and a shape.

`python -m slimplus.kernels.tune` measures launches on a GPU and writes the fastest of each shape into a table in
`configs/`, under the GPU's name. Shapes without an entry get a default launch. The defaults have not been measured:
they were chosen by the compiled code, for no spilled registers and the fewest instructions per weight. No table is
shipped.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

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


WARPS_PER_MULTIPROCESSOR = 12  # that its registers hold at up to 8 tokens; more would only write more partial sums

_DECODE = {8: LaunchConfig(128, 8, 1, 2, 3), 16: LaunchConfig(128, 16, 1, 2, 3)}
_LARGE = LaunchConfig(64, 64, 1, 4, 3)
DEFAULTS = {
    80: _DECODE | {32: LaunchConfig(128, 32, 1, 4, 2), 256: _LARGE},
    90: _DECODE | {32: LaunchConfig(64, 32, 1, 4, 3), 256: _LARGE},
}
"""Default launch by compute capability (90 is 9.0) and largest number of tokens; `split_k` follows from the shape.

Programs of two warps decode with `mma.sync`. With four or more, Triton takes Hopper's `wgmma`, which occupies the
tensor cores as long for 8 tokens as for 64. Capabilities without an entry get that of 8.0.
"""


def choose_launch(
    device: torch.device, out_features: Sequence[int], in_features: int, group_size: int, tokens: int
) -> LaunchConfig:
    """Return the launch for a product on `device`: the tuned one if there is any, otherwise a default.

    Args:
        device: a GPU, or the CPU under Triton's interpreter.
        out_features: rows of each layer.
        in_features: columns of every layer.
        group_size: columns a group.
        tokens: rows of the inputs.
    """
    return _choose(device, tuple(out_features), in_features, group_size, bucket(tokens))


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


def default_launch(
    capability: int, out_features: Sequence[int], in_features: int, group_size: int, tokens: int, multiprocessors: int
) -> LaunchConfig:
    """Return a launch that fills the GPU, with at least two groups a program.

    Args:
        capability: compute capability of the GPU, 90 for 9.0.
        out_features: rows of each layer.
        in_features: columns of every layer.
        group_size: columns a group.
        tokens: rows of the inputs.
        multiprocessors: multiprocessors of the GPU.
    """
    defaults = DEFAULTS.get(capability, DEFAULTS[80])
    launch = defaults[next(most for most in defaults if tokens <= most)]
    if group_size > 128:  # 128 rows of a larger group overflow the registers
        launch = replace(launch, block_n=64)
    blocks = sum(-(-rows // launch.block_n) for rows in out_features) * -(-tokens // launch.block_m)
    wanted = -(-WARPS_PER_MULTIPROCESSOR * multiprocessors // (blocks * launch.num_warps))
    groups = -(-in_features // group_size)
    return replace(launch, split_k=max(1, min(wanted, groups // 2)))


@functools.cache
def _choose(
    device: torch.device, out_features: tuple[int, ...], in_features: int, group_size: int, tokens: int
) -> LaunchConfig:
    if device.type != "cuda":
        return default_launch(80, out_features, in_features, group_size, tokens, multiprocessors=1)
    gpu = torch.cuda.get_device_properties(device)
    launches = read_table(table_file(CONFIGS, gpu.name)).get(shape_key(out_features, in_features, group_size), {})
    if str(tokens) in launches:
        return LaunchConfig(**launches[str(tokens)])
    return default_launch(
        10 * gpu.major + gpu.minor, out_features, in_features, group_size, tokens, gpu.multi_processor_count
    )
