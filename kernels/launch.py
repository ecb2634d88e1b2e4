"""Which launch of `packed_matmul` suits a GPU and a shape.

A GPU that was tuned (`python -m slimplus.kernels.tune`) has a table in `configs/`, by its name; a shape in it gets the
fastest launch measured there. Every other gets a default. The defaults were chosen by what the compiler makes of them
(no spilled registers, the least instructions per weight) and never measured; no table is shipped yet.
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
"""Numbers of tokens up to which a launch was tuned."""


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


WARPS_PER_MULTIPROCESSOR = 12  # as its registers hold at up to 8 tokens; more would only leave more partial sums

_DECODE = {8: LaunchConfig(128, 8, 1, 2, 3), 16: LaunchConfig(128, 16, 1, 2, 3)}
_LARGE = LaunchConfig(64, 64, 1, 4, 3)
DEFAULTS = {
    80: _DECODE | {32: LaunchConfig(128, 32, 1, 4, 2), 256: _LARGE},
    90: _DECODE | {32: LaunchConfig(64, 32, 1, 4, 3), 256: _LARGE},
}
"""Compute capability → most tokens → launch, whose `split_k` follows from the shape.

Programs of two warps decode with `mma.sync`; from four on Triton takes Hopper's `wgmma`, which keeps the tensor cores
as long for 8 tokens as for 64. Other capabilities than 9.0 get what is there for 8.0.
"""


def choose_launch(
    device: torch.device, out_features: Sequence[int], in_features: int, group_size: int, tokens: int
) -> LaunchConfig:
    """The launch for a product on `device`; on a CPU, under Triton's interpreter, a default one."""
    return _choose(device, tuple(out_features), in_features, group_size, bucket(tokens))


def bucket(tokens: int) -> int:
    """The smallest of BUCKETS that holds `tokens`."""
    return next(size for size in BUCKETS if tokens <= size)


def shape_key(out_features: Sequence[int], in_features: int, group_size: int) -> str:
    """How a table calls a shape: `4096+1024+1024x4096 g128`."""
    return f"{'+'.join(map(str, out_features))}x{in_features} g{group_size}"


def table_file(folder: Path, gpu: str) -> Path:
    """Where the launches of a GPU lie."""
    return folder / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def read_table(file: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Shape → bucket → launch; nothing where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["launches"] if file.is_file() else {}


def default_launch(
    capability: int, out_features: Sequence[int], in_features: int, group_size: int, tokens: int, multiprocessors: int
) -> LaunchConfig:
    """A launch that fills the GPU, with at least two groups a program."""
    defaults = DEFAULTS.get(capability, DEFAULTS[80])
    launch = defaults[next(most for most in defaults if tokens <= most)]
    if group_size > 128:  # 128 rows of such a group overflow the registers
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
