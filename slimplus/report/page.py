"""The HTML page of a report: one file with its charts, styles and scripts in it, which loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from slimplus.report.charts import Chart, charts
from slimplus.report.run_files import RunFigures, events, read_runs
from slimplus.utils.files import write_atomic
from slimplus.utils.units import format_bytes, format_seconds

SECTIONS = {
    "bits": "Bits",
    "sensitivity": "Sensitivity",
    "bytes": "Bytes",
    "errors": "Error of the blocks",
    "curves": "Training",
    "resources": "Time and memory",
}
"""Section of charts → heading, in the order of the page."""

COLUMNS = (
    *("text", "windows × tokens", "perplexity, full precision", "perplexity, quantized", "ratio"),
    *("KL, mean", "median", "99th percentile", "maximum", "same top token"),
)
"""Columns of the evaluation besides the run's name."""

KL, AGREEMENT = ("kl_mean", "kl_median", "kl_p99", "kl_max"), "top_token_agreement"

Row = tuple[str, list[str]]
"""Name of a figure, and its value for each run."""


def write_report(folders: Sequence[str | Path], file: Path) -> None:
    """Write the report on the runs in `folders`, one or several, to a file.

    Raises:
        InputError: if a folder is no run directory, or a file of it is damaged.
    """
    write_atomic(file, render(read_runs(folders)))


def render(runs: Sequence[RunFigures]) -> str:
    """Return the page on one run, or on several compared."""
    environment = Environment(loader=PackageLoader("slimplus.report"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    drawn = charts(runs)
    return environment.get_template("report.html.j2").render(
        runs=runs,
        title=" and ".join(run.name for run in runs),
        headline=headline(runs),
        sections={name: [chart for chart in drawn if chart.section == name] for name in ("headline", *SECTIONS)},
        headings=SECTIONS,
        evaluation_columns=COLUMNS,
        evaluations=[row for run in runs for row in evaluation_rows(run)],
        samples={run.name: run.metrics["sentence"] for run in runs if run.metrics.get("sentence")},
        events={run.name: events(run.metrics) for run in runs},
        differences=recipe_differences(runs),
        versions=_table(runs, [_versions(run) for run in runs]),
        identities=_table(runs, [_texts(run.fingerprint) for run in runs]),
        figures=_figures(drawn),
        plotly=Markup(get_plotlyjs()),
    )


def _figures(drawn: Sequence[Chart]) -> Markup:
    """Return the charts as JSON that may stand in a script element: no `<` can end that."""
    content = json.dumps([json.loads(chart.figure.to_json()) for chart in drawn])
    return Markup(content.replace("<", "\\u003c"))


def headline(runs: Sequence[RunFigures]) -> list[Row]:
    """Return the figures that a reader asks for first, as far as the runs have come."""
    found = [_headline(run.metrics) for run in runs]
    return _table(runs, found)


def _headline(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the first figures of one run by name."""
    perplexity = metrics["perplexity"]
    rows = {"method": str(metrics["method"])}
    if "size_bytes" in metrics:
        rows["size"] = format_bytes(metrics["size_bytes"])
        rows["times smaller than at 16 bit"] = f"{metrics['compression']:.2f}"
        rows["average bits"] = f"{metrics['average_bits']:.3f}"
        if metrics.get("packed_share", 1) < 1:
            rows["weights of the blocks that are packed"] = f"{metrics['packed_share']:.1%}"
        rows["bits per weight, all that is stored"] = f"{metrics['bits_per_weight']:.3f}"
    if "full" in perplexity:
        rows["perplexity, full precision"] = f"{perplexity['full']:.2f}"
    if "quantized" in perplexity:
        rows["perplexity, quantized"] = f"{perplexity['quantized']:.2f}"
    if len(perplexity) == 2:
        rows["perplexity ratio"] = f"{perplexity['quantized'] / perplexity['full']:.3f}"
    if "divergence" in metrics:
        rows["KL from full precision, mean"] = f"{metrics['divergence']['kl_mean']:.4g}"
        rows["same top token"] = f"{metrics['divergence'][AGREEMENT]:.1%}"
    if metrics["seconds"]:
        rows["time"] = format_seconds(sum(metrics["seconds"].values()))
    if "peak_memory_bytes" in metrics:
        rows["peak memory"] = format_bytes(metrics["peak_memory_bytes"])
    if "peak_device_memory_bytes" in metrics:
        rows["peak memory of the device"] = format_bytes(metrics["peak_device_memory_bytes"])
    return rows


def evaluation_rows(run: RunFigures) -> Iterator[list[str]]:
    """Yield a row for each text: run, text, windows, perplexity of both models, their ratio, divergence."""
    divergence = run.metrics.get("divergence", {})
    evaluation, perplexity = run.metrics["evaluation"], run.metrics["perplexity"]
    full, quantized = perplexity.get("full"), perplexity.get("quantized")
    yield [
        run.name,
        evaluation["text"],
        f"{evaluation['windows']} × {evaluation['sequence_length']}",
        "" if full is None else f"{full:.2f}",
        "" if quantized is None else f"{quantized:.2f}",
        "" if full is None or quantized is None else f"{quantized / full:.3f}",
        *(f"{divergence[key]:.4g}" if key in divergence else "" for key in KL),
        f"{divergence[AGREEMENT]:.1%}" if divergence else "",
    ]


def recipe_differences(runs: Sequence[RunFigures]) -> list[Row]:
    """Return the keys of the recipes that are not the same in all runs, with the value in each."""
    rows = _table(runs, [dict(_flat(yaml.safe_load(run.recipe))) for run in runs])
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key of a recipe by its dotted path, and its value as JSON."""
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _versions(run: RunFigures) -> dict[str, str]:
    """Return the versions of libraries, and the machine where it is known."""
    machine = {
        key: ", ".join(value) if isinstance(value, list) else str(value)
        for key, value in run.metrics.get("machine", {}).items()
        if value
    }
    return dict(run.metrics["libraries"]) | machine | {"precision": str(run.metrics["precision"])}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the values as text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _table(runs: Sequence[RunFigures], columns: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return a row for each key that any run has, with an empty cell where a run has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]
