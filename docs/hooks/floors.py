"""Draw who imports whom in slimplus, from the imports themselves, as an SVG in the colours of the page."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx

PICTURE, TABLE = "<!-- floors -->", "<!-- imports -->"
FOLDERS = ("slimplus", "kernels", "benchmarks")
WIDTH, BOX, GAP, FLOOR_GAP = 960, 212, 22, 46
LINE, HEADER, MARGIN = 16, 27, 12
LETTERS = 30  # of a line of module names in a box

Bounds = tuple[float, float, float]
"""Upper edge of a floor, lower edge of a box or slot on it, lower edge of the floor."""


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Return the page with the picture and the table in the place of their markers."""
    if PICTURE not in markdown and TABLE not in markdown:
        return markdown
    graph = imports(Path(config.config_file_path).parent)
    return markdown.replace(PICTURE, picture(graph)).replace(TABLE, "\n".join(_rows(graph)))


def imports(root: Path) -> nx.DiGraph:
    """Return the parts of the package with their `modules`, and an edge from each part to every other it imports.

    A part is a folder of slimplus, or a module that lies directly in it; `kernels/` and `benchmarks/` lie beside it.

    Raises:
        ValueError: if parts import each other in a circle.
    """
    graph = nx.DiGraph()
    part_of: dict[Path, str] = {}
    for file in [*(file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))), root / "train.py"]:
        where = file.relative_to(root).with_suffix("").parts
        part, *inner = where[1:] if where[0] == "slimplus" and len(where) > 2 else where
        part = inner.pop(0) if part == "slimplus" and inner != ["__init__"] else part
        part_of[file] = part
        graph.add_node(part)
        graph.nodes[part].setdefault("modules", []).extend(inner[-1:] if inner[-1:] != ["__init__"] else [])
    for file, part in part_of.items():
        named = (goal if goal in graph else "slimplus" for goal in _imported(file))  # slimplus.load is of the package
        graph.add_edges_from((part, goal) for goal in named if goal != part)
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError(f"parts of the package import each other: {nx.find_cycle(graph)}")
    return graph


def _imported(file: Path) -> Iterator[str]:
    """Yield the parts of slimplus that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (f"{name}.".split(".")[1] for name in names if name.split(".")[0] == "slimplus")


def floors(graph: nx.DiGraph) -> list[list[str]]:
    """Return the parts by floor, the highest first: each floor is above all that its parts import."""
    return [sorted(floor) for floor in nx.topological_generations(graph.reverse())][::-1]


def picture(graph: nx.DiGraph) -> str:
    """Return the SVG; arrows that others imply are left out."""
    levels = floors(graph)
    number = {part: level for level, parts in enumerate(levels) for part in parts}
    # An arrow that passes floors takes a slot on each of them, so that no box hides it.
    paths = [
        [user, *((user, goal, level) for level in range(number[user] + 1, number[goal])), goal]
        for user, goal in nx.transitive_reduction(graph).edges
    ]
    steps = nx.DiGraph(step for path in paths for step in pairwise(path))
    slots = [[node for path in paths for node in path[1:-1] if node[2] == level] for level in range(len(levels))]
    lines = {part: textwrap.wrap(", ".join(graph.nodes[part]["modules"]), LETTERS) for part in graph}
    heights = {part: HEADER + LINE * len(lines[part]) + (8 if lines[part] else 2) for part in graph}
    centres: dict[Any, float] = {}
    bounds: dict[Any, Bounds] = {}
    top = 0.0
    for parts, passing in zip(levels, slots, strict=True):
        centres |= _spread([*parts, *passing], steps, centres)
        floor = max(heights[part] for part in parts)
        bounds |= {node: (top, top + heights.get(node, floor), top + floor) for node in [*parts, *passing]}
        top += floor + FLOOR_GAP
    arrows = (_arrow([(centres[node], bounds[node]) for node in path]) for path in paths)
    boxes = (_box(part, centres[part] - BOX / 2, bounds[part], lines[part], graph) for part in graph)
    return (
        f'<div class="wide"><svg class="floors" viewBox="0 -4 {WIDTH} {top - FLOOR_GAP + 8:.0f}" role="img" '
        'aria-label="The parts of slimplus; each imports only parts below it">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z"/></marker></defs>{"".join(arrows)}{"".join(boxes)}</svg></div>'
    )


def _spread(nodes: list[Any], steps: nx.DiGraph, centres: dict[Any, float]) -> dict[Any, float]:
    """Return the middles of boxes and slots on a floor, each near what leads to it from above."""

    def wanted(node: Any) -> tuple[float, str]:
        above = [centres[user] for user in steps.predecessors(node)] if node in steps else []
        return (sum(above) / len(above) if above else WIDTH / 2), str(node)

    nodes = sorted(nodes, key=wanted)
    widths = [BOX if isinstance(node, str) else 0 for node in nodes]
    left = (WIDTH - sum(widths) - GAP * (len(nodes) - 1)) / 2
    return {node: left + sum(widths[:place]) + GAP * place + widths[place] / 2 for place, node in enumerate(nodes)}


def _arrow(stops: list[tuple[float, Bounds]]) -> str:
    """Return the path from the first stop, a box, along slots to the upper edge of the last one."""
    (x, (_, bottom, y)), *others = stops
    curve = f"M{x:.0f} {bottom:.0f} V{y:.0f}"
    for number, (to_x, (upper, _, lower)) in enumerate(others, start=1):
        middle = (y + upper) / 2
        curve += f" C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {upper:.0f}"
        curve += f" V{lower:.0f}" if number < len(others) else ""
        x, y = to_x, lower
    return f'<path class="arrow" d="{curve}"/>'


def _box(part: str, left: float, bounds: Bounds, lines: list[str], graph: nx.DiGraph) -> str:
    top, bottom, _ = bounds
    x = f"{left + MARGIN:.0f}"
    texts = "".join(
        f'<text class="modules" x="{x}" y="{top + HEADER + LINE * (number + 0.7):.0f}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f"<g><title>{part} imports {', '.join(sorted(graph.successors(part))) or 'nothing of slimplus'}</title>"
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX}" height="{bottom - top:.0f}" rx="6"/>'
        f'<text class="part" x="{x}" y="{top + 19:.0f}">{part}</text>{texts}</g>'
    )


def _rows(graph: nx.DiGraph) -> Iterator[str]:
    """Yield the table of all imports, top floor first."""
    yield "| part | imports | is imported by |"
    yield "|---|---|---|"
    for part in (part for floor in floors(graph) for part in floor):
        yield f"| `{part}` | {_names(graph.successors(part))} | {_names(graph.predecessors(part))} |"


def _names(parts: Iterable[str]) -> str:
    return ", ".join(f"`{part}`" for part in sorted(parts))
