"""What a run ends with: its summary, the results in the model card of its checkpoint, its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimplus.evaluation.tables import Cells, align, answer_cells, describe_windows, markdown, task_cells, text_cells
from slimplus.models.auto_class import auto_class
from slimplus.pipeline.job import Job
from slimplus.pipeline.model_card import model_card
from slimplus.recipe.schema import Recipe
from slimplus.report.run_files import FILE, events
from slimplus.utils.units import format_bytes


def results_table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the results in metrics.json as rows of name and value."""
    perplexity, evaluation = metrics["perplexity"], metrics["evaluation"]
    return [
        ("method", metrics["method"]),
        (
            f"perplexity ({evaluation['text']}, {describe_windows(evaluation)})",
            f"{perplexity['full']:.2f} full precision, {perplexity['quantized']:.2f} quantized",
        ),
        ("divergence from full precision", describe_divergence(metrics["divergence"])),
        *_calibration_rows(metrics),
        ("average bits", f"{metrics['average_bits']:.3f}{share_text(metrics)}"),
        ("bits per weight, all that is stored", f"{metrics['bits_per_weight']:.3f}"),
        *_embedding_and_head_row(metrics),
        *_expert_rows(metrics),
        (
            "checkpoint",
            f"{format_bytes(metrics['size_bytes'])}, {metrics['compression']:.2f} times smaller than at 16 bit",
        ),
        ("peak memory", format_bytes(metrics["peak_memory_bytes"])),
        ("time", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in metrics["seconds"].items())),
    ]


def _calibration_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on how texts share the windows, where there are several or the stages read other numbers."""
    shared = metrics.get("calibration", {})  # runs of earlier versions do not tell it
    if len(shared) == 1 and len(shared["blocks"]) == 1:
        return []
    return [
        (f"windows of {stage.replace('_', ' ')}", ", ".join(f"{text} {count}" for text, count in shares.items()))
        for stage, shares in shared.items()
    ]


def describe_divergence(divergence: Mapping[str, float]) -> str:
    """Return the divergence in metrics.json as text."""
    return (
        f"KL {divergence['kl_mean']:.4g} on average, median {divergence['kl_median']:.4g}, "
        f"99th percentile {divergence['kl_p99']:.4g}, maximum {divergence['kl_max']:.4g}; "
        f"the same top token for {divergence['top_token_agreement']:.1%}"
    )


def share_text(metrics: Mapping[str, Any]) -> str:
    """Return of what the average bits are, for a line of the results; runs of earlier versions do not tell it."""
    share = metrics.get("packed_share")
    return "" if share is None else f", of the {share:.1%} of the weights in the blocks that are packed"


def _embedding_and_head_row(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the row of the packed layers outside the blocks, if there are any."""
    bits = ", ".join(f"{name} {bits} bits" for name, bits in metrics["outer_bits"].items())
    return [("packed outside the blocks", f"{bits}: {format_bytes(metrics['outer_bytes'])}")] if bits else []


def _expert_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on a mixture's experts, if there are any; runs of earlier versions do not tell of them."""
    rows = []
    if (coverage := metrics.get("experts")) is not None:
        dead = [f"{', '.join(map(str, experts))} of {name}" for name, experts in coverage["dead"].items()]
        unseen = f"; none for experts {'; '.join(dead)}" if dead else ""
        tokens = f"at least {coverage['tokens_least']:,}, median {coverage['tokens_median']:,.0f}{unseen}"
        rows.append(("calibration tokens of an expert", tokens))
    if (agreement := metrics.get("routing_agreement")) is not None:
        rows.append(("experts chosen as at full precision", f"{agreement:.1%}"))
    return rows


def tables_of(metrics: Mapping[str, Any]) -> list[Cells]:
    """Return the tables that follow the results: of the texts, if there are several, of tasks and of answers."""
    texts = [text_cells(metrics["texts"])] if len(metrics["texts"]) > 1 else []
    tasks = [task_cells(metrics["tasks"]["scores"])] if "tasks" in metrics else []
    answers = [answer_cells(metrics["generation"])] if "generation" in metrics else []
    return [lines for lines in (*texts, *tasks, *answers) if len(lines) > 1]


def summary(metrics: Mapping[str, Any], packed: str, sentence: str | None) -> str:
    """Return the summary of a run as plain text.

    Args:
        metrics: the content of metrics.json.
        packed: the folder of the packed checkpoint.
        sentence: a sample of what the packed model writes; None if it could not write one.
    """
    rows = results_table(metrics)
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in [*rows, *events(metrics)])
    tables = "".join(f"\n\n{align(lines)}" for lines in tables_of(metrics))
    sample = "" if sentence is None else f" It writes:\n\n    {sentence}"
    return f"{table}{tables}\n\nThe packed checkpoint is in {packed}.{sample}\n"


def finished_card(recipe: Recipe, metrics: Mapping[str, Any], packed: Path) -> str:
    """Return README.md of the packed checkpoint of a finished run, with its results."""
    loader = auto_class(json.loads((packed / "config.json").read_text(encoding="utf-8"))).__name__
    tables = [[["", ""], *map(list, results_table(metrics))], *tables_of(metrics)]
    share = metrics.get("packed_share", 1.0)  # runs of earlier versions pack all
    return model_card(recipe, loader, metrics["average_bits"], share, metrics, "\n\n".join(map(markdown, tables)))


def finish(job: Job) -> str | None:
    """Write the summary, put the results into the model card, and write the report.

    Returns:
        The summary on the first rank, None on the others.
    """
    job.fabric.barrier()  # once the first process ends, the others are ended
    if not job.fabric.is_global_zero:
        return None
    text = summary(job.metrics, str(job.run.packed), job.metrics["sentence"])
    job.run.write("summary.txt", text)
    job.run.write("packed/README.md", finished_card(job.recipe, job.metrics, job.run.packed))
    from slimplus.report.page import write_report  # plotly takes a second to import, and only the end needs it

    write_report([job.run.root], job.run.root / FILE)
    return text
