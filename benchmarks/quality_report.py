"""What `benchmarks/quality.py` shows: a table for each calibration budget, and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a table for each average of bits and each budget, the seeds of a method in one line.

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
    """Seconds of the stages that make the model; not those that measure it."""
    return {stage: seconds for stage, seconds in row["seconds"].items() if stage not in ("full_precision", "packed")}


def _perplexity(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    if not measured:
        return ""
    spread = f" ± {stdev(measured):.2f} ({len(measured)} seeds)" if len(measured) > 1 else ""
    return f"{mean(measured):,.{2 if measured[0] < 100 else 0}f}{spread}"


def _cells(line: Sequence[str]) -> str:
    return "| " + " | ".join(line) + " |"


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of `(bits, perplexity)`, those that no other one beats in both, by rising bits."""
    best: list[tuple[float, float]] = []
    for bits, perplexity in sorted(points):
        if not best or perplexity < best[-1][1]:
            best.append((bits, perplexity))
    return best


def plot(rows: Sequence[Row], text: str, file: Path) -> None:
    """Perplexity on one text against stored bits per weight, a symbol a method, and the front of the best ones."""
    from matplotlib.figure import Figure  # not needed for the table
    from matplotlib.ticker import LogFormatter

    rows = [row for row in rows if text in row["perplexity"]]
    points = [(row["bits_per_weight"], row["perplexity"][text], row["method"]) for row in rows if "bits" in row]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(name for _, _, name in points)):
        mine = [(bits, perplexity) for bits, perplexity, other in points if other == name]
        axes.plot(*zip(*mine, strict=True), "osD^v"[number // 10 % 5], label=name)  # matplotlib has ten colours
    front = pareto(point[:2] for point in points)
    axes.step([bits for bits, _ in front], [best for _, best in front], where="post", color="0.6", zorder=0)
    for row in rows:
        if "bits" not in row:
            axes.axhline(row["perplexity"][text], linestyle=":", color="0.4", label=_name(row))
    axes.set(xlabel="stored bits per weight", ylabel=f"perplexity, {text}", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # none where they would lie on each other
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150)
