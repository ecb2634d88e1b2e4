"""Draw where the packed format puts each column of a group, found by packing one column after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from slimplus.format.affine import QuantizedWeight
from slimplus.format.planes import PLANES, pack

MARKER = "<!-- bit layout -->"
GROUP_SIZE = 64
CELL, HEIGHT, LEFT = 26, 26, 78
COLOURS = 4


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with the picture in the place of its marker."""
    return markdown.replace(MARKER, _picture()) if MARKER in markdown else markdown


def first_word(plane: int) -> list[int]:
    """Return the column that each bit of the first word of a plane belongs to, bit 0 first."""
    columns: dict[int, int] = {}
    for column in range(GROUP_SIZE):
        integers = torch.zeros(1, GROUP_SIZE, dtype=torch.uint8)
        integers[0, column] = 2**plane - 1
        one = torch.ones(1, 1)
        word = pack(QuantizedWeight(integers, one, 0 * one, torch.tensor([plane]), GROUP_SIZE))[f"qplane{plane}"][0, 0]
        columns |= {bit: column for bit in range(8 * word.dtype.itemsize) if int(word) >> bit & 1}
    return [columns[bit] for bit in sorted(columns)]


def _picture() -> str:
    rows = "".join(line for number, plane in enumerate(PLANES) for line in _word(plane, number * (HEIGHT + 26)))
    width, height = LEFT + 32 * CELL + 2, len(PLANES) * (HEIGHT + 26) + 4
    label = f"Columns held by the bits of the first word of each plane, for groups of {GROUP_SIZE} columns"
    svg = f'<svg class="bits" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{rows}</svg>'
    return f'<div class="wide">{svg}</div>'


def _word(plane: int, top: int) -> Iterator[str]:
    """Yield a word of the plane, its lowest bit on the right: a box for each field, with the column that it holds."""
    columns = first_word(plane)
    yield f'<text class="plane" x="0" y="{top + HEIGHT - 8}">qplane{plane}</text>'
    for first in range(0, len(columns), plane):
        column = columns[first]
        left = LEFT + (32 - first - plane) * CELL
        colour = first // plane * COLOURS // (len(columns) // plane)
        yield (
            f'<rect class="field{colour}" x="{left}" y="{top + 1}" width="{plane * CELL}" height="{HEIGHT}"/>'
            f'<text class="column" x="{left + plane * CELL / 2}" y="{top + HEIGHT - 8}">{column}</text>'
        )
    for bit in sorted({0, len(columns) // 2, len(columns) - 1}):
        yield f'<text class="bit" x="{LEFT + (31.5 - bit) * CELL}" y="{top + HEIGHT + 14}">bit {bit}</text>'
