"""Draw the way of a model through a run, and check that the modules named in the picture are there."""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from typing import Any

MARKER = "<!-- flow -->"
WAY = (  # there in the upper row, back in the lower one
    ("text", "data.text"),
    ("windows", "data.windows"),
    ("block inputs", "models.streaming"),
    ("Hessians", "quantization.salience"),
    ("bits", "quantization.knapsack"),
    ("grids, integers", "quantization.gptq"),
    ("training", "training.reconstruction"),
    ("packed block", "format.planes"),
    ("training end to end", "training.end_to_end"),
    ("checkpoint", "hub.checkpoint"),
)
COLUMNS = len(WAY) // 2
BOX, HEIGHT, GAP, ROW = 164, 46, 35, 106
LOOP = WAY.index(("packed block", "format.planes")), WAY.index(("block inputs", "models.streaming"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with the picture in the place of its marker."""
    return markdown.replace(MARKER, _picture()) if MARKER in markdown else markdown


def _place(number: int) -> tuple[int, int]:
    """Return the left upper corner of a box."""
    row, column = divmod(number, COLUMNS)
    return (column if row == 0 else COLUMNS - 1 - column) * (BOX + GAP) + 1, row * ROW + 1


def _picture() -> str:
    width, height = COLUMNS * (BOX + GAP) - GAP + 2, ROW + HEIGHT + 4
    drawn = [_box(number, *names) for number, names in enumerate(WAY)]
    drawn += [_arrow(number) for number in range(len(WAY) - 1)]
    start, end = (_place(number) for number in LOOP)
    x = start[0] + BOX / 2
    drawn.append(f'<path class="arrow" d="M{x:.0f} {start[1]} V{end[1] + HEIGHT}"/>')
    drawn.append(f'<text class="modules" x="{x + 10:.0f}" y="{ROW - 24}">the next block</text>')
    return (
        f'<div class="wide"><svg class="floors" viewBox="0 0 {width} {height}" role="img" aria-label="From a text to a '
        'packed checkpoint, block by block"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>{"".join(drawn)}</svg></div>'
    )


def _box(number: int, title: str, module: str) -> str:
    if find_spec(f"slimplus.{module}") is None:
        raise ModuleNotFoundError(f"the picture of a run names slimplus.{module}, which is not there")
    x, y = _place(number)
    return (
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
        f'<text class="part" x="{x + 12}" y="{y + 19}">{escape(title)}</text>'
        f'<text class="modules" x="{x + 12}" y="{y + 36}">{module}</text>'
    )


def _arrow(number: int) -> str:
    (x, y), (to_x, to_y) = _place(number), _place(number + 1)
    if y != to_y:
        path = f"M{x + BOX / 2:.0f} {y + HEIGHT} V{to_y}"
    elif to_x > x:
        path = f"M{x + BOX} {y + HEIGHT / 2:.0f} H{to_x}"
    else:
        path = f"M{x} {y + HEIGHT / 2:.0f} H{to_x + BOX}"
    return f'<path class="arrow" d="{path}"/>'
