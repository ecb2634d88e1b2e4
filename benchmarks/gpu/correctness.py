"""Products of every kind against float64 on random inputs, twice, into outputs that held NaN before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import ROOT, Rows
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import LaunchConfig, bucket, default_launch
from slimplus.kernels.measure import TOLERANCE, random_weights, relative_error

OUT_FEATURES = (272, 48, 80)
IN_FEATURES, RAGGED = 1024, 1000
WIDTHS = ((1, 2, 2, 3), (2,), (2, 3, 3, 4), (3,), (4,), (1,), (1, 2, 3, 4))
WIDE = ((8,), (5, 6, 7), (2, 8))
TOKENS = (1, 4, 8, 16, 17, 64, 256)
SANITIZER_SECONDS = 100


@dataclass(frozen=True)
class Checked:
    """A product to check.

    Attributes:
        widths: widths of the groups, in turn.
        group_size: columns a group.
        in_features: columns.
        tokens: rows of the inputs.
        dtype: dtype of the inputs.
        scale_bits: bits of a stored scale.
    """

    widths: tuple[int, ...]
    group_size: int
    in_features: int
    tokens: int
    dtype: torch.dtype
    scale_bits: int

    def case(self) -> dict[str, Any]:
        """Return the entries of the row that name the product."""
        return {
            "widths": list(self.widths),
            "group_size": self.group_size,
            "in_features": self.in_features,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "scale_bits": self.scale_bits,
        }


def products(visit: Visit) -> list[Checked]:
    """Return the products to check, those of the commonest models first; three in a rehearsal."""
    bfloat16, float16 = torch.bfloat16, torch.float16
    if visit.rehearsal:
        return [
            Checked((1, 2, 2, 3), 32, 128, 1, bfloat16, 16),
            Checked((4,), 32, 100, 17, float16, 8),
            Checked((5, 8), 32, 128, 1, bfloat16, 16),
        ]
    found = [
        Checked(*each, 16) for each in product(WIDTHS, (128, 64, 256), (IN_FEATURES,), TOKENS, (bfloat16, float16))
    ]
    found += [Checked(WIDTHS[0], group_size, RAGGED, each, bfloat16, 16) for group_size in (128, 64) for each in TOKENS]
    found += [Checked(WIDTHS[0], 128, IN_FEATURES, each, bfloat16, 8) for each in TOKENS]
    sizes = product(WIDE, (128, 64, 256), (IN_FEATURES,), [each for each in TOKENS if each <= 16], (bfloat16, float16))
    return found + [Checked(*each, 16) for each in sizes]


def launches(visit: Visit) -> Iterator[tuple[FusedShape, str, str, LaunchConfig]]:
    """Yield the kernels of the products: shape, dtypes of inputs and scales by name, and launch."""
    for each in products(visit):
        shape = FusedShape(each.in_features, each.group_size, OUT_FEATURES, tuple(sorted(set(each.widths))))
        scales = "float16" if each.scale_bits == 16 else "uint8"
        launch = default_launch(visit.capability, each.group_size, bucket(each.tokens))
        yield shape, str(each.dtype).removeprefix("torch."), scales, launch


def run(visit: Visit, rows: Rows) -> None:
    """Check every product, and a few of them under NVIDIA's memory checker, if it is installed."""
    for each in products(visit):
        rows.measure(each.case(), partial(check, visit, each))
    rows.measure({"tool": "memcheck"}, partial(_sanitize, visit))


def check(visit: Visit, checked: Checked) -> dict[str, Any]:
    """Return how far a product is off.

    Raises:
        RuntimeError: if it is off by too much, differs from one call to the next, or leaves counters that are not zero.
    """
    rows = (20, 16) if visit.rehearsal else OUT_FEATURES
    sizes = (rows, checked.in_features, checked.group_size, checked.widths, visit.device)
    weights = random_weights(*sizes, scale_bits=checked.scale_bits)
    inputs = torch.randn(checked.tokens, checked.in_features, device=visit.device).to(checked.dtype)
    exact = weights.exact(inputs)
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN
    try:
        first, second = weights.multiply(inputs), weights.multiply(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    error = relative_error(first, exact)
    if not error <= TOLERANCE[checked.dtype]:
        raise RuntimeError(f"relative error {error:.1e}, above {TOLERANCE[checked.dtype]:.0e}")
    if not torch.equal(first, second):
        raise RuntimeError("the same product gave other bits the second time")
    if weights.counters.any():
        raise RuntimeError("the product left counters that are not zero")
    return {"relative_error": error}


def _sanitize(visit: Visit) -> dict[str, Any]:
    """Multiply for one token and for many under `compute-sanitizer`."""
    tool = shutil.which("compute-sanitizer")
    if visit.rehearsal:
        small_products(visit.device)
    if visit.rehearsal or tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    program = (
        "import torch; from benchmarks.gpu.correctness import small_products; small_products(torch.device('cuda'))"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False)
    return {"exit_code": done.returncode, "output": done.stdout.splitlines()[-20:]}


def small_products(device: torch.device) -> None:
    """Multiply mixed widths and ragged columns by one token and by many."""
    weights = random_weights((48, 20), 200, 64, (1, 2, 3, 4), device)
    for tokens in (1, 17):
        weights.multiply(torch.randn(tokens, 200, device=device).bfloat16())
