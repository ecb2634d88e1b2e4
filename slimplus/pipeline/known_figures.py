"""What metrics.json holds when a run starts: what identifies it, and the figures of earlier starts that still hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from lightning.fabric import Fabric
from transformers import PreTrainedModel

from slimplus.evaluation.tasks import LoadedTasks, settings
from slimplus.evaluation.texts import EvaluationText
from slimplus.models.architectures import quantized_linears
from slimplus.recipe.evaluation import EvaluationSection
from slimplus.recipe.schema import Recipe, to_yaml
from slimplus.run_dir.allocation_file import average_bits
from slimplus.run_dir.directory import RunDirectory
from slimplus.run_dir.fingerprint import library_versions
from slimplus.run_dir.metrics import Metrics
from slimplus.utils.machine import describe_machine
from slimplus.utils.progress import Progress

MEASURED = ("perplexity", "divergence")  # figures of each text in metrics.json; those of the first stand apart as well
ASKED = ("sentence", "tasks", "generation")  # figures of what a model wrote


def start_metrics(
    recipe: Recipe,
    run: RunDirectory,
    fabric: Fabric,
    texts: Sequence[EvaluationText],
    tasks: LoadedTasks | None,
    precision: str,
    identity: dict[str, Any],
    events: list[str],
    progress: Progress,
) -> Metrics:
    """Write what identifies the run, and return its metrics with those of earlier starts and with new events."""
    values = _known_figures(recipe, run, texts, precision, identity)
    values |= _known_answers(recipe.evaluation, tasks, values)
    metrics = Metrics(values, run, fabric.device, fabric.is_global_zero, progress)
    metrics["events"] += events
    fabric.barrier()  # every process has read the fingerprint of the earlier start
    if fabric.is_global_zero:
        run.manifest.add(run.tokens)
        run.write("fingerprint.json", identity)
        run.write("recipe.yaml", to_yaml(recipe))
    metrics.save()
    return metrics


def _known_figures(
    recipe: Recipe, run: RunDirectory, texts: Sequence[EvaluationText], precision: str, identity: dict[str, Any]
) -> dict[str, Any]:
    """Return what metrics.json holds so far; measured figures only if they are of the same model and windows."""
    before, identity_before = run.read("metrics.json"), run.read("fingerprint.json")
    decisive = ("model.path", "model.gguf_file", "model.dtype", "model configuration", "trainer.precision")
    if not all(identity_before.get(key) == identity[key] for key in decisive):
        before = {key: value for key, value in before.items() if key not in (*MEASURED, *ASKED, "texts")}
    measured = {row["fingerprint"]: row for row in _measured_texts(before)}
    rows = [{"perplexity": {}} | measured.get(text.fingerprint, {}) | text.protocol for text in texts]
    fresh: dict[str, Any] = {
        "method": recipe.quantization.method,
        "model": recipe.model.path,
        "precision": precision,
        "libraries": library_versions(),
        "machine": describe_machine(),
        "evaluation": texts[0].protocol,
        "texts": rows,
        **{key: deepcopy(rows[0][key]) for key in MEASURED if key in rows[0]},
    }
    asks = {"tasks": bool(recipe.evaluation.tasks), "generation": bool(recipe.evaluation.prompts)}
    rest = {key: value for key, value in before.items() if key not in MEASURED and asks.get(key, True)}
    return {"seconds": {}, "events": []} | rest | fresh


def _measured_texts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each text; runs of earlier versions measured one, and did not list it."""
    if "texts" in metrics or "evaluation" not in metrics:
        return list(metrics.get("texts", []))
    figures = {key: metrics[key] for key in MEASURED if key in metrics}
    return [metrics["evaluation"] | figures]


def _known_answers(section: EvaluationSection, tasks: LoadedTasks | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries on tasks and prompts, with what models have answered to the same ones."""
    asked: dict[str, Any] = {}
    if tasks is not None:
        before = known.get("tasks", {})
        same = before.get("settings") == settings(tasks)
        asked["tasks"] = {"settings": settings(tasks), "scores": before["scores"] if same else {}}
    if section.prompts:
        asked["generation"] = {"prompts": section.prompts, "new_tokens": section.new_tokens}
        before = known.get("generation", {})
        if all(before.get(key) == value for key, value in asked["generation"].items()):
            asked["generation"] = before
    return asked


def note_average(metrics: Metrics, recipe: Recipe, allocation: Mapping[str, list[int]], model: PreTrainedModel) -> None:
    """Note that an imported allocation has another average than the recipe asks for, if it has."""
    settings = recipe.quantization
    average = average_bits(allocation, quantized_linears(model), settings.group_size)
    if average != settings.bits:
        metrics.note(
            f"quantization.allocation gives {average:.3f} bits on average, not quantization.bits={settings.bits}"
        )
