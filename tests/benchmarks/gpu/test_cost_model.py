"""The predicted times of products against those that the constants were fitted to."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from benchmarks.gpu.cost_model import CURRENT, FITTED, MICROSECOND, Kernel, Product, predict
from tests.support.processes import ROOT

MULTIPROCESSORS = 132
RESIDENT = {(2,): 8, (1, 2, 2, 3): 6, (3,): 7, (2, 3, 3, 4): 6, (4,): 8}
"""Widths in turn → programs that fit a multiprocessor, as the fit had them."""
LAYERS = {
    "qkv": ((4096, 4096, 4096), 4096, 9),
    "o": ((4096,), 4096, 16),
    "gate_up": ((11008, 11008), 4096, 5),
    "down": ((4096,), 11008, 25),
}
"""Layer → rows, columns, programs that share groups."""
CELLS = [
    ("qkv", (2,), (6.6, 8.1, 0.0, 0.0)),
    ("qkv", (1, 2, 2, 3), (6.6, 8.9, 0.9, 5.8)),
    ("o", (2,), (7.0, 2.3, 0.0, 0.0)),
    ("o", (1, 2, 2, 3), (7.0, 2.7, 0.9, 0.0)),
    ("gate_up", (2,), (6.2, 14.2, 0.0, 0.0)),
    ("gate_up", (1, 2, 2, 3), (6.2, 15.5, 0.9, 7.8)),
    ("down", (2,), (8.2, 8.1, 0.0, 0.0)),
    ("down", (1, 2, 2, 3), (8.2, 8.2, 0.9, 5.8)),
]
"""Layer, widths, and microseconds: fixed, stream, switches, tail."""


def product(layer: str, widths: tuple[int, ...], split_k: int | None = None) -> Product:
    rows, columns, split = LAYERS[layer]
    groups = [widths[group % len(widths)] for group in range(columns // 128)]
    counts: Mapping[int, int] = {width: groups.count(width) for width in sorted(set(widths))}
    weights = sum(rows) * columns
    size = sum(rows) * sum(16 * width + 3 for width in groups)
    return Product(weights, size, counts, sum(rows) // 128, split_k or split)


@pytest.mark.parametrize(("layer", "widths", "parts"), CELLS)
def test_the_parts_are_those_of_the_fit(layer: str, widths: tuple[int, ...], parts: tuple[float, ...]) -> None:
    found = predict(product(layer, widths), MULTIPROCESSORS, RESIDENT[widths], FITTED)
    seconds = (found.fixed, found.stream, found.switches, found.tail)
    assert [each / MICROSECOND for each in seconds] == pytest.approx(parts, abs=0.11)


def test_the_sums_are_near_the_measurements() -> None:
    mixes = {"2": (2,), "2 (1/2/3)": (1, 2, 2, 3), "3": (3,), "3 (2/3/4)": (2, 3, 3, 4), "4": (4,)}
    file = ROOT / "benchmarks/results/kernels_nvidia_h100_80gb_hbm3.json"
    errors = []
    for row in json.loads(file.read_text())["rows"]:
        widths, measured = mixes[row["bits"]], row["seconds"]["slimplus"]
        predicted = predict(product(row["layer"], widths), MULTIPROCESSORS, RESIDENT[widths], FITTED).total
        errors.append(abs(predicted / measured - 1))
    assert len(errors) == 20
    assert sum(errors) / len(errors) < 0.025
    assert max(errors) < 0.14


@pytest.mark.parametrize(
    ("layer", "split_k", "microseconds"), [("qkv", 8, 15.2), ("o", 16, 10.6), ("gate_up", 4, 23.0), ("down", 24, 16.8)]
)
def test_without_a_tail_wave_mixed_widths_take_less(layer: str, split_k: int, microseconds: float) -> None:
    found = predict(product(layer, (1, 2, 2, 3), split_k), MULTIPROCESSORS, RESIDENT[1, 2, 2, 3], FITTED)
    assert found.tail == 0
    assert found.total / MICROSECOND == pytest.approx(microseconds, abs=0.15)


def test_bytes_count_where_they_take_longer_than_instructions() -> None:
    found = predict(Product(1000, 27_000_000, {2: 32}, 132, 1), MULTIPROCESSORS, 8)
    assert found.stream == pytest.approx(10 * MICROSECOND)
    assert found.fixed == pytest.approx(4.25 * MICROSECOND)


@pytest.mark.parametrize(("kernel", "fewest", "most"), [(FITTED, 65, 66), (CURRENT, 51, 55)])
def test_the_products_of_a_block_without_tail_waves(kernel: Kernel, fewest: float, most: float) -> None:
    splits = {"qkv": 8, "o": 16, "gate_up": 4, "down": 24}
    seconds = [
        predict(product(layer, (1, 2, 2, 3), split), MULTIPROCESSORS, 6, kernel).total
        for layer, split in splits.items()
    ]
    assert fewest < sum(seconds) / MICROSECOND < most
