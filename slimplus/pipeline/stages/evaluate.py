"""The stages that measure the full-precision model, and the packed checkpoint as it loads back."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from slimplus.evaluation.divergence import Comparison, Recorder, TopPredictions
from slimplus.evaluation.generation import continue_text
from slimplus.evaluation.perplexity import perplexity
from slimplus.evaluation.routing import RoutingRecorder, matches
from slimplus.evaluation.texts import EvaluationText
from slimplus.hub.checkpoint import load
from slimplus.models.streaming import StreamedModel
from slimplus.pipeline.job import Job
from slimplus.run_dir.directory import PREDICTIONS, numbered
from slimplus.utils.errors import named_first_line

logger = logging.getLogger(__name__)

ROUTING = "routing."  # before the names of tensors in PREDICTIONS that hold the experts of each token
PROMPT = "The history of the city begins"
# What `generate` and tokenizers raise, some of which belong to the model: the figures of a finished run matter more.
GENERATION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)


def measure_full_precision(job: Job) -> None:
    """Measure the full-precision model's perplexity on each text, and keep its predictions to compare others with."""
    for index, text in enumerate(job.evaluation_texts):
        known = job.run.load_tensors(numbered(PREDICTIONS, index), text.fingerprint)
        if "full" in job.metrics["texts"][index]["perplexity"] and known is not None:
            logger.info("perplexity at full precision, %s: found in metrics.json, skipped", text.config.path)
            continue
        with job.metrics.stage("full_precision"):
            _record_predictions(job, index, text)


def _record_predictions(job: Job, index: int, text: EvaluationText) -> None:
    """Measure the full-precision model on a text, and keep its predictions."""
    recorder = Recorder()
    with RoutingRecorder() as routing:
        measured = _perplexity(job, job.model, text, "full precision", recorder, routing)
    _note_perplexity(job, index, "full", measured)
    predictions, length = recorder.predictions(), text.tokens.shape[1]
    tensors = {
        "tokens": _gather(job, text, predictions.tokens, length - 1),
        "log_probabilities": _gather(job, text, predictions.log_probabilities, length - 1),
    }
    for name, chosen in routing.chosen().items():
        tensors[f"{ROUTING}{name}"] = _gather(job, text, chosen, length)
    if job.fabric.is_global_zero:
        job.run.save_tensors(numbered(PREDICTIONS, index), tensors, text.fingerprint)
    job.fabric.barrier()


def _perplexity(
    job: Job,
    model: StreamedModel,
    text: EvaluationText,
    name: str,
    observer: Recorder | Comparison,
    routing: RoutingRecorder,
) -> float:
    """Return the perplexity of a model on all ranks' windows of a text.

    The observer sees the logits of this rank's windows, and `routing` the experts that their tokens are sent to.
    """
    description = name if len(job.evaluation_texts) == 1 else f"{name}, {text.config.path}"
    return perplexity(
        model,
        job.shard(text.tokens),
        description,
        observer.add,
        job.progress.track,
        job.shard(text.counted),
        routing.watch,
    )


def _note_perplexity(job: Job, index: int, model: str, measured: float) -> None:
    """Put a perplexity among the figures of its text; those of the first text stand apart as well."""
    job.metrics["texts"][index]["perplexity"][model] = measured
    if index == 0:
        job.metrics["perplexity"][model] = measured


def _gather(job: Job, text: EvaluationText, values: Tensor, count: int) -> Tensor:
    """Return all ranks' values by window, `[windows, count, ...]`, from this rank's, `count` a window, in a row."""
    rows = values.unflatten(0, (-1, count)).to(job.runner.device)
    return job.ranks.gather(rows, len(text.tokens)).cpu()


def _full_precision(job: Job, index: int, text: EvaluationText) -> dict[str, Tensor]:
    """Return what is kept of the full-precision model on this rank's windows of a text, in a row."""
    tensors = job.run.load_tensors(numbered(PREDICTIONS, index), text.fingerprint)
    assert tensors is not None
    return {name: job.shard(tensor).flatten(0, 1) for name, tensor in tensors.items()}


def _routing_agreement(job: Job, found: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float | None:
    """Return the share of the full-precision model's choices of experts that the packed model makes, of all ranks."""
    expected = {name.removeprefix(ROUTING): chosen for name, chosen in kept.items() if name.startswith(ROUTING)}
    if not expected:
        return None
    counts = torch.tensor(matches(found, expected), dtype=torch.int64, device=job.runner.device)
    agreeing, total = job.ranks.sum(counts).tolist()
    return agreeing / max(total, 1)


def measure_packed(job: Job) -> None:
    """Measure the checkpoint as it loads back: perplexity, divergence from full precision, a sentence it writes."""
    rows = job.metrics["texts"]
    missing = [index for index, row in enumerate(rows) if "divergence" not in row]
    if not missing and "sentence" in job.metrics:
        logger.info("perplexity of the checkpoint: found in metrics.json, skipped")
        return
    job.release_model()
    with job.metrics.stage("packed"):
        # What is not packed becomes float32; autocast lowers it as the precision says.
        model = load(job.run.packed, dtype=torch.float32)
        streamed = StreamedModel(model, job.runner)
        job.run.open()  # the first rank has written predictions since the others read which files are complete
        for index in missing:
            _compare(job, index, streamed)
        model.base_model.to(job.runner.device)
        if "sentence" not in job.metrics:
            _write_sentence(job, model)


def _compare(job: Job, index: int, model: StreamedModel) -> None:
    """Measure the packed model on a text: perplexity, and divergence from full precision."""
    text = job.evaluation_texts[index]
    kept = _full_precision(job, index, text)
    comparison = Comparison(TopPredictions(kept["tokens"], kept["log_probabilities"]))
    with RoutingRecorder() as routing:
        measured = _perplexity(job, model, text, "packed", comparison, routing)
    _note_perplexity(job, index, "quantized", measured)
    found = torch.stack([torch.cat(comparison.divergences), torch.cat(comparison.agreements).double()], -1)
    divergences, agreements = _gather(job, text, found, text.tokens.shape[1] - 1).flatten(0, 1).unbind(-1)
    job.metrics["texts"][index]["divergence"] = text.divergence(divergences, agreements)
    agreement = _routing_agreement(job, routing.chosen(), kept)
    if index == 0:
        job.metrics["divergence"] = job.metrics["texts"][0]["divergence"]
        if agreement is not None:
            job.metrics["routing_agreement"] = agreement
    job.metrics.checkpoint()


def _write_sentence(job: Job, model: torch.nn.Module) -> None:
    """Have the packed model continue a sentence."""
    try:
        job.metrics["sentence"] = continue_text(model, job.tokenizer, PROMPT)
    except GENERATION_ERRORS as error:
        job.metrics["sentence"] = None
        job.metrics.note(f"the checkpoint's sample sentence could not be written: {named_first_line(error)}")
