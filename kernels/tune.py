"""Measure the launches of the packed products on this GPU and write the fastest into its table.

    python -m slimplus.kernels.tune --shapes 4096+4096+4096x4096 4096x4096 11008+11008x4096 4096x11008

A shape is OUTxIN; weights that are multiplied in one launch (QKV, gate and up) are joined by `+`. The table lies in the
package (`kernels/configs`, or `--output`), is read at the first product of a process, and keeps what it holds of other
shapes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from slimplus.kernels.launch import BUCKETS, CONFIGS, LaunchConfig, read_table, shape_key, table_file
from slimplus.kernels.measure import (
    TOLERANCE,
    RandomWeights,
    Timer,
    copies_beyond_cache,
    graph_seconds,
    product_calls,
    random_weights,
    relative_error,
)
from slimplus.utils.files import write_atomic

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SUMS_PER_WARP = (256, 2048)  # of a block; fewer starve the tensor cores, more overflow the registers


def candidates(tokens: int, groups: int) -> Iterator[LaunchConfig]:
    """The launches to try for a bucket of tokens and a weight of so many groups of columns."""
    block_m = {32, 64, 128} if tokens > 64 else {tokens}
    splits = [split for split in (1, 2, 4, 8, 16, 32) if split <= max(1, groups // 2)]
    for launch in itertools.starmap(LaunchConfig, itertools.product((64, 128), block_m, splits, (2, 4, 8), (2, 3, 4))):
        if SUMS_PER_WARP[0] <= launch.block_n * launch.block_m // launch.num_warps <= SUMS_PER_WARP[1]:
            yield launch


def tune_shape(
    weights: Sequence[RandomWeights], tokens: int, dtype: torch.dtype, timer: Timer, launches: Sequence[LaunchConfig]
) -> LaunchConfig:
    """The fastest of `launches` for `tokens` inputs, each checked before it is timed.

    Raises:
        RuntimeError: if a launch yields wrong products, or none fits the GPU.
    """
    device = weights[0].counters.device
    inputs = torch.randn(tokens, weights[0].shape.in_features, dtype=dtype, device=device)
    exact = weights[0].exact(inputs)
    seconds = {}
    for launch in launches:
        try:
            error = relative_error(weights[0].multiply(inputs, launch), exact)
        except OutOfResources:  # more shared memory than this GPU has
            continue
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{launch} multiplies wrongly: relative error {error:.1e}")
        seconds[launch] = timer(product_calls(weights, inputs, launch))
    if not seconds:
        raise RuntimeError(f"no launch for {tokens} tokens fits this GPU")
    return min(seconds, key=lambda launch: seconds[launch])


def tune(
    shape: tuple[tuple[int, ...], int],
    group_size: int,
    mix: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = graph_seconds,
    buckets: Sequence[int] = BUCKETS,
) -> dict[str, dict[str, int]]:
    """Bucket → fastest launch, as the table holds it, for weights of `shape` (rows of each, columns)."""
    first = random_weights(*shape, group_size, mix, device)
    copies = copies_beyond_cache(first.size, device)
    weights = [first, *(random_weights(*shape, group_size, mix, device) for _ in range(copies - 1))]
    groups = -(-shape[1] // group_size)
    return {
        str(tokens): asdict(tune_shape(weights, tokens, dtype, timer, list(candidates(tokens, groups))))
        for tokens in tqdm(buckets, desc=shape_key(*shape, group_size))
    }


def parse_shape(text: str) -> tuple[tuple[int, ...], int]:
    """`4096+1024x4096` → rows of each weight, and columns."""
    rows, columns = text.split("x")
    return tuple(int(each) for each in rows.split("+")), int(columns)


def write_table(folder: Path, gpu: str, launches: dict[str, dict[str, dict[str, int]]]) -> Path:
    """Add `launches` to the table of a GPU; what it holds of other shapes stays."""
    file = table_file(folder, gpu)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    table = {"gpu": gpu, "versions": versions, "launches": read_table(file) | launches}
    write_atomic(file, json.dumps(table, indent=2) + "\n")
    return file


def main() -> None:
    """Parse the arguments, tune every shape and write the table after each."""
    parser = argparse.ArgumentParser(
        prog="python -m slimplus.kernels.tune", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, required=True, metavar="OUT[+OUT...]xIN")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 2, 3], help="widths of the groups, in turn")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder of the tables")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: launches can only be measured on one")
    device = torch.device("cuda", torch.cuda.current_device())
    for shape in arguments.shapes:
        launches = tune(shape, arguments.group_size, arguments.bits, DTYPES[arguments.dtype], device)
        gpu = torch.cuda.get_device_name(device)
        file = write_table(arguments.output, gpu, {shape_key(*shape, arguments.group_size): launches})
        sys.stdout.write(f"{file}: {shape_key(*shape, arguments.group_size)}\n")


if __name__ == "__main__":
    main()
