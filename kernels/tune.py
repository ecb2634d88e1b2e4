"""Measure the launches of packed products on this GPU, and write the fastest ones into its table.

    python -m slimplus.kernels.tune --shapes 4096+4096+4096x4096 4096x4096 11008+11008x4096 4096x11008

A shape is OUTxIN; the rows of layers that are multiplied in one launch (QKV, gate and up) are joined by `+`. The table
lies in the package (`kernels/configs`) or in the folder `--output`. A process reads it at its first product. Entries of
other shapes stay in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import BUCKETS, CONFIGS, LaunchConfig, read_table, shape_key, split_groups, table_file
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
from slimplus.kernels.packed_matmul import count_slots, max_tokens
from slimplus.utils.files import write_atomic

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TILES = {
    8: ((128, 8, 2, 3), (64, 8, 2, 3), (128, 8, 4, 3), (128, 8, 2, 4)),
    16: ((128, 16, 2, 3), (64, 16, 2, 3), (128, 16, 4, 3), (128, 16, 2, 2)),
    32: ((64, 32, 4, 3), (128, 32, 4, 2), (128, 32, 8, 3), (64, 32, 2, 3)),
    64: ((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (128, 64, 4, 2)),
    128: ((64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2)),
    256: ((64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2)),
}
"""Bucket of tokens → rows, tokens, warps and stages to try: the default's, and what differs from it in one respect."""
SHARES = (1.0, 0.75, 0.5)
"""Parts of the programs that the GPU runs at the same time, for which groups are split."""


def tiles(tokens: int) -> list[LaunchConfig]:
    """Return the tiles to try for a bucket of tokens, as launches whose programs share no groups."""
    return [LaunchConfig(rows, columns, 1, warps, stages) for rows, columns, warps, stages in TILES[tokens]]


def candidates(
    tokens: int, shape: FusedShape, slots: Callable[[LaunchConfig], int], shares: Sequence[float] = SHARES
) -> list[LaunchConfig]:
    """Return the launches to try for a bucket of tokens, at most 12.

    Args:
        tokens: a bucket of tokens.
        shape: shape of the layers.
        slots: function that returns how many programs of a launch the GPU runs at the same time.
        shares: parts of these programs to fill.
    """
    sizes = shape.out_features, shape.in_features, shape.group_size, tokens
    found: dict[LaunchConfig, None] = {}  # in order, without repetitions
    for tile in tiles(tokens):
        try:
            most = slots(tile)
        except OutOfResources:  # a program needs more shared memory than this GPU has
            continue
        found |= dict.fromkeys(split_groups(tile, *sizes, int(most * share)) for share in shares)
    return list(found)


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
        error = relative_error(weights[0].multiply(inputs, launch), exact)
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{launch} multiplies wrongly: its relative error is {error:.1e}, above {TOLERANCE[dtype]}"
            )
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
    """Return the fastest launch of each bucket of tokens, as the table holds it.

    Args:
        shape: rows of each layer, and columns of every layer.
        group_size: columns a group.
        mix: widths of the groups, in turn.
        dtype: dtype of the inputs.
        device: the GPU.
        timer: measures the seconds a call takes.
        buckets: numbers of tokens; those that the kernel does not take for these widths are left out.
    """
    first = random_weights(*shape, group_size, mix, device)
    copies = copies_beyond_cache(first.size, device)
    weights = [first, *(random_weights(*shape, group_size, mix, device) for _ in range(copies - 1))]
    most = max_tokens(mix)
    slots = partial(count_slots, device, first.shape, dtype, first.fused["scales"].dtype, False)
    return {
        str(tokens): asdict(tune_shape(weights, tokens, dtype, timer, candidates(tokens, first.shape, slots)))
        for tokens in tqdm([each for each in buckets if each <= most], desc=shape_key(*shape, group_size))
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
