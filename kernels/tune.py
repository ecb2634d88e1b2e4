"""Measure the launches of packed products on this GPU, and write the fastest ones into its table.

    python -m slimplus.kernels.tune --shapes 4096+4096+4096x4096 4096x4096 11008+11008x4096 4096x11008

A shape is OUTxIN; the rows of layers that are multiplied in one launch (QKV, gate and up) are joined by `+`. The table
lies in the package (`kernels/configs`) or in the folder `--output`. A process reads it at its first product. Entries of
other shapes stay in it.
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
SUMS_PER_WARP = (256, 2048)  # range worth trying: fewer starve the tensor cores, more overflow the registers


def candidates(tokens: int, groups: int) -> Iterator[LaunchConfig]:
    """Yield the launches to try for a bucket of tokens and a weight with `groups` groups of columns."""
    block_m = {32, 64, 128} if tokens > 64 else {tokens}
    splits = [split for split in (1, 2, 4, 8, 16, 32) if split <= max(1, groups // 2)]
    for launch in itertools.starmap(LaunchConfig, itertools.product((64, 128), block_m, splits, (2, 4, 8), (2, 3, 4))):
        if SUMS_PER_WARP[0] <= launch.block_n * launch.block_m // launch.num_warps <= SUMS_PER_WARP[1]:
            yield launch


def tune_shape(
    weights: Sequence[RandomWeights], tokens: int, dtype: torch.dtype, timer: Timer, launches: Sequence[LaunchConfig]
) -> LaunchConfig:
    """Return the fastest of some launches; each is checked before it is timed.

    Args:
        weights: weights of the same shape, which the timed calls read in turn.
        tokens: rows of the inputs.
        dtype: dtype of the inputs, float16 or bfloat16.
        timer: measures the seconds a call takes.
        launches: launches to try.

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
        except OutOfResources:  # the launch needs more shared memory than this GPU has
            continue
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{launch} multiplies wrongly: its relative error is {error:.1e}, above {TOLERANCE[dtype]}"
            )
        seconds[launch] = timer(product_calls(weights, inputs, launch))
    if not seconds:
        raise RuntimeError(f"none of the {len(launches)} launches for {tokens} tokens fits this GPU")
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
    """Return the fastest launch of each bucket of tokens, as the table holds it.

    Args:
        shape: rows of each layer, and columns of every layer.
        group_size: columns a group.
        mix: widths of the groups, in turn.
        dtype: dtype of the inputs.
        device: the GPU.
        timer: measures the seconds a call takes.
        buckets: numbers of tokens.
    """
    first = random_weights(*shape, group_size, mix, device)
    copies = copies_beyond_cache(first.size, device)
    weights = [first, *(random_weights(*shape, group_size, mix, device) for _ in range(copies - 1))]
    groups = -(-shape[1] // group_size)
    return {
        str(tokens): asdict(tune_shape(weights, tokens, dtype, timer, list(candidates(tokens, groups))))
        for tokens in tqdm(buckets, desc=shape_key(*shape, group_size))
    }


def parse_shape(text: str) -> tuple[tuple[int, ...], int]:
    """Return the rows of each layer and the columns of a shape such as `4096+1024x4096`."""
    rows, columns = text.split("x")
    return tuple(int(each) for each in rows.split("+")), int(columns)


def write_table(folder: Path, gpu: str, launches: dict[str, dict[str, dict[str, int]]]) -> Path:
    """Add the launches of some shapes to the table of a GPU, and return its file; entries of other shapes stay."""
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
        parser.error("PyTorch finds no GPU; launches can only be measured on one")
    device = torch.device("cuda", torch.cuda.current_device())
    for shape in arguments.shapes:
        launches = tune(shape, arguments.group_size, arguments.bits, DTYPES[arguments.dtype], device)
        gpu = torch.cuda.get_device_name(device)
        file = write_table(arguments.output, gpu, {shape_key(*shape, arguments.group_size): launches})
        sys.stdout.write(f"{file}: {shape_key(*shape, arguments.group_size)}\n")


if __name__ == "__main__":
    main()
