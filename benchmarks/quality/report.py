"""What `benchmarks/quality/run.py` measured: a table for each calibration budget, and the figure of the README.

python benchmarks/quality/report.py   # draws docs/assets/quality* from benchmarks/results/quality.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
ASSETS = ROOT / "docs" / "assets"

TEXT, TITLE, SUBTITLE = "wikitext2", "WikiText-2 perplexity at 2 to 4 bits", "SmolLM2-135M, log scale, lower is better"
LARGEST = 160  # perplexity at which a longer line ends in an arrow
SMALL_TEXT: dict[str, Any] = {"va": "center", "style": "italic", "size": 10}
STORED_BITS = 1.19  # where their column ends, in parts of the axes' width


@dataclass(frozen=True)
class Rung:
    """One line of the figure: a method at an average of bits, and the keys it was given besides."""

    label: str
    method: str
    bits: int = 2
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ladder:
    """Lines of the figure that have the same calibration windows and steps."""

    title: str
    samples: int
    sequence_length: int
    epochs: int
    rungs: tuple[Rung, ...]


LADDERS = (
    Ladder(
        "16,384 tokens, block by block",
        samples=64,
        sequence_length=256,
        epochs=8,
        rungs=(
            Rung("GPTQ", "GPTQ"),
            Rung("SliM-LLM", "SliM-LLM"),
            Rung("AutoRound", "AutoRound"),
            Rung("SliM-LLM+", "SliM-LLM+"),
            Rung("trained rounding, uniform bits", "uniform, rounding"),
            Rung("slimplus", "slimplus"),
        ),
    ),
    Ladder(
        "131,072 tokens, then end to end",
        samples=256,
        sequence_length=512,
        epochs=2,
        rungs=(
            Rung("trained weights, uniform bits", "uniform, weights, end to end"),
            Rung("slimplus", "slimplus, end to end"),
            Rung("slimplus, 3 bits", "slimplus, end to end", 3),
            Rung("slimplus, 4 bits", "slimplus, end to end", 4, ("quantization.widths=[2,3,4,5,6]",)),
        ),
    ),
)


@dataclass(frozen=True)
class Theme:
    """Colours of the figure; the background of an SVG stays transparent."""

    background: str
    text: str
    muted: str
    grid: str
    other: str
    highlight: str


LIGHT = Theme("#ffffff", "#1f2328", "#59636e", "#e4e8ec", "#9aa4ae", "#bc4c00")
DARK = Theme("#0d1117", "#e6edf3", "#9198a1", "#252b33", "#656c76", "#f0883e")


def table(rows: Sequence[Row]) -> str:
    """Return Markdown: a table for each average of bits and each budget, a line for all seeds of a method.

    Perplexities of several seeds are their mean ± their standard deviation.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["perplexity"]))
    head = ["method", *(f"perplexity, {name}" for name in names), "average bits", "stored bits", "minutes", "memory"]
    references = [row for row in rows if "bits" not in row]
    parts = []
    for title, group in _grouped(row for row in rows if "bits" in row).items():
        methods: dict[str, list[Row]] = defaultdict(list)
        for row in [*references, *group]:
            methods[_name(row)].append(row)
        lines = [_line(name, seeds, names) for name, seeds in methods.items()]
        parts.append("\n".join([title, "", _cells(head), "|---" * len(head) + "|", *map(_cells, lines)]))
    return "\n\n".join(parts)


def _grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        steps = row["epochs"] * row["samples"] // _windows_per_step(row)
        budget = f"{row['samples']} windows of {row['sequence_length']} tokens of {row['calibration']}"
        groups[f"{row['bits']} bits, {budget}, {steps} steps a block where blocks are trained"].append(row)
    return groups


def _windows_per_step(row: Row) -> int:
    values = dict(key.split("=", 1) for key in row["overrides"])
    return int(values.get("training.batch_size", 1))


def _name(row: Row) -> str:
    epochs = f" × {row['end_to_end_epochs']}" if "end_to_end_epochs" in row else ""
    return ", ".join([row["method"] + epochs, *row["overrides"]])


def _line(name: str, seeds: Sequence[Row], texts: Sequence[str]) -> list[str]:
    cells = [name, *(_perplexity([row["perplexity"].get(text) for row in seeds]) for text in texts)]
    first = seeds[0]
    if "seconds" not in first:
        return [*cells, "16", "16", "", ""]
    work = [sum(_work(row).values()) / 60 for row in seeds]
    memory = max(row["peak_memory_bytes"] for row in seeds) / 1e9
    bits = (f"{first['average_bits']:.3f}", f"{first['bits_per_weight']:.3f}")
    return [*cells, *bits, f"{mean(work):.0f}", f"{memory:.1f} GB"]


def _work(row: Row) -> dict[str, float]:
    """Return the seconds of the stages that make the model, without those that measure it."""
    return {stage: seconds for stage, seconds in row["seconds"].items() if stage not in ("full_precision", "packed")}


def _perplexity(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    if not measured:
        return ""
    spread = f" ± {stdev(measured):.2f} ({len(measured)} seeds)" if len(measured) > 1 else ""
    return f"{mean(measured):,.{2 if measured[0] < 100 else 0}f}{spread}"


def _cells(line: Sequence[str]) -> str:
    return "| " + " | ".join(line) + " |"


def measured_rungs(rows: Sequence[Row], ladder: Ladder, text: str) -> list[tuple[Rung, float, float]]:
    """Return `(rung, perplexity, stored bits per weight)` of the measured rungs of a ladder, averaged over seeds."""
    budget = {name: getattr(ladder, name) for name in ("samples", "sequence_length", "epochs")}
    found = []
    for rung in ladder.rungs:
        wanted = budget | {"method": rung.method, "bits": rung.bits, "overrides": list(rung.overrides)}
        same = [row for row in rows if text in row["perplexity"] and wanted.items() <= row.items()]
        if same:
            found.append((rung, mean(row["perplexity"][text] for row in same), same[0]["bits_per_weight"]))
    return found


def plot(rows: Sequence[Row], text: str, file: Path, theme: Theme = LIGHT) -> None:
    """Draw how far each method of `LADDERS` is from full precision on one text, a line a method.

    Args:
        rows: of quality.json, full precision among them; a line of which there is no row is left out.
        text: name of the evaluation text.
        file: an `.svg`, whose background is transparent, or an image of another kind.
        theme: colours.
    """
    import matplotlib as mpl  # not needed for the table
    from matplotlib.figure import Figure

    full = mean(row["perplexity"][text] for row in rows if "bits" not in row)
    is_vector = file.suffix == ".svg"
    with mpl.rc_context({"svg.hashsalt": "quality", "font.size": 11}):
        figure = Figure(figsize=(9.6, 5.0), facecolor=theme.background)
        figure.text(0.01, 0.945, TITLE, color=theme.text, size=14, weight="bold")
        figure.text(0.99, 0.945, SUBTITLE, color=theme.muted, ha="right")
        axes = figure.add_axes((0.275, 0.12, 0.6, 0.785), facecolor="none")
        height = 0.0
        for ladder in LADDERS:
            height = _draw_ladder(axes, ladder.title, measured_rungs(rows, ladder, text), full, height, theme)
        _draw_axis(axes, full, height, theme)
        figure.savefig(file, dpi=200, transparent=is_vector, metadata={"Date": None} if is_vector else None)


def _draw_ladder(
    axes: Axes, title: str, rungs: Sequence[tuple[Rung, float, float]], full: float, top: float, theme: Theme
) -> float:
    """Draw the rungs below `top`, a unit each, from full precision to their perplexity; return the top of the next."""
    across = axes.get_yaxis_transform()  # x in parts of the axes' width
    axes.text(-0.442, top, title, color=theme.muted, transform=across, **SMALL_TEXT)
    for number, (rung, perplexity, stored) in enumerate(rungs, 1):
        y, end, outside = top - number, min(perplexity, LARGEST), perplexity > LARGEST
        is_slimplus = rung.label.startswith("slimplus")
        line, ink = (theme.highlight, theme.highlight) if is_slimplus else (theme.other, theme.text)
        style: dict[str, Any] = {"color": ink, "va": "center", "weight": "bold" if is_slimplus else "normal"}
        axes.plot([full, end], [y, y], color=line, linewidth=5, solid_capstyle="butt")
        axes.plot(end, y, marker=">" if outside else "o", color=line, markersize=10)
        value = f"{perplexity:,.{0 if perplexity > 100 else 1}f}"
        axes.annotate(value, (end, y), (9, 0), textcoords="offset points", **style)
        axes.text(-0.02, y, rung.label, ha="right", transform=across, **style)
        axes.text(STORED_BITS, y, f"{stored:.2f}", color=theme.muted, ha="right", va="center", transform=across)
    return top - len(rungs) - 1.5


def _draw_axis(axes: Axes, full: float, bottom: float, theme: Theme) -> None:
    """Draw the line of full precision, the axis of perplexity and the head of the column of stored bits."""
    axes.set(xscale="log", xlim=(full, LARGEST * 1.12), ylim=(bottom + 0.8, 0.6), yticks=[])
    axes.set_xticks([full, 30, 40, 60, 80, 120], [f"{full:.1f}\nfull precision", "30", "40", "60", "80", "120"])
    axes.set_xticks([], minor=True)
    axes.tick_params(colors=theme.muted, length=0)
    axes.get_xticklabels()[0].set_color(theme.text)
    axes.grid(axis="x", color=theme.grid, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.axvline(full, color=theme.text, linewidth=1.5)
    across = axes.get_yaxis_transform()
    axes.text(STORED_BITS, 0, "stored bits", color=theme.muted, ha="right", transform=across, **SMALL_TEXT)


def main() -> None:
    """Draw the figure of the README and the documentation, for light and dark pages."""
    rows = json.loads(RESULTS.read_text())["rows"]
    plot(rows, TEXT, ASSETS / "quality-light.svg", LIGHT)
    plot(rows, TEXT, ASSETS / "quality-dark.svg", DARK)
    plot(rows, TEXT, ASSETS / "quality.png", LIGHT)


if __name__ == "__main__":
    main()
