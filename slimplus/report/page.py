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

from slimplus.evaluation.tables import AGREEMENT, MODELS, Cells, answer_cells, task_cells, text_cells
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
        evaluation=evaluation_table(runs),
        tasks=task_table(runs),
        answers=answer_table(runs),
        answered={run.name: answers_side_by_side(run) for run in runs},
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


def evaluation_table(runs: Sequence[RunFigures]) -> Cells:
    """Return the figures of each text of each run, with the run's name before it if there are several."""
    return _joined(runs, [text_cells(_texts_of(run.metrics)) for run in runs])


def task_table(runs: Sequence[RunFigures]) -> Cells:
    """Return the scores of the tasks of each run, with the run's name before them if there are several."""
    return _joined(runs, [task_cells(run.metrics["tasks"]["scores"]) if "tasks" in run.metrics else [] for run in runs])


def answer_table(runs: Sequence[RunFigures]) -> Cells:
    """Return the figures of the answers of each run, with the run's name before them if there are several."""
    return _joined(
        runs, [answer_cells(run.metrics["generation"]) if "generation" in run.metrics else [] for run in runs]
    )


def _joined(runs: Sequence[RunFigures], tables: Sequence[Cells]) -> Cells:
    """Return the tables of the runs as one, whose columns are those of all of them."""
    names = list(dict.fromkeys(name for lines in tables for name in (lines[0] if lines else ())))
    rows = [
        [run.name, *(dict(zip(lines[0], line, strict=True)).get(name, "") for name in names)]
        for run, lines in zip(runs, tables, strict=True)
        for line in lines[1:]
    ]
    joined = [["run", *names], *rows]
    return joined if len(runs) > 1 else [line[1:] for line in joined]


def answers_side_by_side(run: RunFigures) -> list[tuple[str, dict[str, str]]]:
    """Return each prompt with the answers by the name of the model."""
    generation = run.metrics.get("generation", {"prompts": []})
    models = {MODELS[model]: generation[model] for model in MODELS if generation.get(model)}
    return [
        (prompt, {name: found["answers"][index] for name, found in models.items()})
        for index, prompt in enumerate(generation["prompts"])
        if models
    ]


def _texts_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each text; runs of earlier versions measured one, and did not list it."""
    alone = {key: metrics[key] for key in ("perplexity", "divergence") if key in metrics}
    return metrics["texts"] if "texts" in metrics else [metrics["evaluation"] | alone]


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
