"""Tables of measured figures: the same cells in the summary, the report, the model card and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cells = list[list[str]]
"""A header, and a row of as many cells for each measurement."""

MODELS = {
    "full": "full precision",
    "quantized": "quantized",
    "against": "against",
    "checkpoint": "checkpoint",
}
"""Model in metrics.json, or in the figures of `slimplus evaluate`, full precision first → its name in a table."""
LARGE = 1e4  # perplexities of broken models have dozens of digits
KL = {"kl_mean": "KL, mean", "kl_median": "median", "kl_p99": "99th percentile", "kl_max": "maximum"}
AGREEMENT = "top_token_agreement"
BOS = {"never": ", no BOS", "window": ", BOS in each"}


def text_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Return a row for each text: its windows, the perplexities, their ratio, the divergence.

    Args:
        rows: figures of the texts, as `texts` in metrics.json.
    """
    models = _models([row["perplexity"] for row in rows])
    lines = [["text", "windows", *(f"perplexity, {MODELS[model]}" for model in models)]]
    lines[0] += ["ratio", *KL.values(), "same top token"]
    for row in rows:
        perplexity, divergence = row["perplexity"], row.get("divergence", {})
        cells = [row["text"], describe_windows(row), *(_cell(perplexity.get(model), ".2f") for model in models)]
        values = [perplexity[model] for model in models if model in perplexity]
        cells.append(f"{values[1] / values[0]:.3f}" if len(values) == 2 else "")
        cells += [_cell(divergence.get(key), ".4g") for key in KL]
        cells.append(_cell(divergence.get(AGREEMENT), ".1%"))
        lines.append(cells)
    return without_empty_columns(lines)


def task_cells(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> Cells:
    """Return a row for each metric of each task, without the parts of groups: the models' values, standard errors.

    Args:
        scores: model → the rows of its scores, as `tasks.scores` in metrics.json.
    """
    models = _models([scores])
    lines = [["task", "metric", "examples in the prompt", "examples", *(MODELS[model] for model in models)]]
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for model in models:
        for row in scores[model]:
            if row["part_of"] is None:
                rows.setdefault((row["task"], row["metric"]), {})[model] = row
    for (task, metric), found in rows.items():
        any_row = next(iter(found.values()))
        counts = [_cell(any_row[key], "d") for key in ("num_fewshot", "examples")]
        lines.append([task, metric, *counts, *(_with_error(found.get(model)) for model in models)])
    return without_empty_columns(lines)


def _with_error(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    value = f"{row['value']:.4f}" if abs(row["value"]) < LARGE else f"{row['value']:.5g}"
    return value if row["stderr"] is None else f"{value} ± {row['stderr']:.4f}"


def answer_cells(generation: Mapping[str, Any]) -> Cells:
    """Return a row for each model that has answered the prompts, see `slimplus.evaluation.answers`.

    Args:
        generation: `generation` in metrics.json.
    """
    count = len(generation["prompts"])
    names = {"empty": "empty", "garbled": "garbled", "repeating": "repeating"}
    numbers = {"repetition": "repetition", "distinct_1": "distinct-1", "distinct_2": "distinct-2"}
    lines = [["answers of", *names.values(), *numbers.values(), "tokens"]]
    for model in _models([generation]):
        if (figures := generation[model]) is not None:
            cells = [f"{figures[key]} of {count}" for key in names] + [f"{figures[key]:.3f}" for key in numbers]
            lines.append([MODELS[model], *cells, f"{figures['length']:.1f}"])
    return lines


def describe_windows(row: Mapping[str, Any]) -> str:
    """Return how a text is read, in words: `16 × 2048, stride 512, BOS in each`."""
    length = row["sequence_length"]
    stride, bos = row.get("stride", length), row.get("bos", "auto")  # runs of earlier versions do not tell them
    side_by_side = stride >= length - (bos == "window")
    return f"{row['windows']} × {length}" + ("" if side_by_side else f", stride {stride}") + BOS.get(bos, "")


def _models(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the models that any of the values is of, full precision first."""
    return [model for model in MODELS if any(model in value for value in values)]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def without_empty_columns(lines: Cells) -> Cells:
    """Return a table without the columns that are empty below the header."""
    kept = [number for number in range(len(lines[0])) if any(line[number] for line in lines[1:])]
    return [[line[number] for number in kept] for line in lines]


def align(lines: Cells) -> str:
    """Return a table as text, the first column to the left and numbers under their names."""
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([f"{name:<{sizes[0]}}", *(f"{cell:>{size}}" for cell, size in zip(cells, sizes[1:], strict=True))])
        for name, *cells in lines
    )


def markdown(lines: Cells) -> str:
    """Return a table as Markdown."""
    header, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([header, "|" + "---|" * len(lines[0]), *rows])
