"""The stages that measure the full-precision model, and the packed checkpoint as it loads back."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from slimplus.evaluation.divergence import Comparison, Recorder, TopPredictions, statistics
from slimplus.evaluation.generation import continue_text
from slimplus.evaluation.perplexity import perplexity
from slimplus.evaluation.routing import RoutingRecorder, matches
from slimplus.hub.checkpoint import load
from slimplus.models.streaming import StreamedModel
from slimplus.pipeline.job import Job
from slimplus.run_dir.directory import PREDICTIONS
from slimplus.utils.errors import named_first_line

logger = logging.getLogger(__name__)

ROUTING = "routing."  # before the names of tensors in PREDICTIONS that hold the experts of each token
PROMPT = "The history of the city begins"
# What `generate` and tokenizers raise, some of which belong to the model: the figures of a finished run matter more.
GENERATION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)


def measure_full_precision(job: Job) -> None:
    """Measure the perplexity of the full-precision model, and keep its predictions to compare others with."""
    known = job.run.load_tensors(PREDICTIONS, job.evaluation.fingerprint)
    if "full" in job.metrics["perplexity"] and known is not None:
        logger.info("perplexity at full precision: found in metrics.json, skipped")
        return
    with job.metrics.stage("full_precision"):
        recorder, tokens = Recorder(), job.shard(job.evaluation.tokens)
        with RoutingRecorder() as routing:
            job.metrics["perplexity"]["full"] = perplexity(
                job.model, tokens, "full precision", recorder.add, job.progress.track, routing.watch
            )
        predictions, count = recorder.predictions(), job.evaluation.tokens.shape[1] - 1
        tensors = {
            "tokens": _gather(job, predictions.tokens, count),
            "log_probabilities": _gather(job, predictions.log_probabilities, count),
        }
        for name, chosen in routing.chosen().items():
            tensors[f"{ROUTING}{name}"] = _gather(job, chosen, job.evaluation.tokens.shape[1])
        if job.fabric.is_global_zero:
            job.run.save_tensors(PREDICTIONS, tensors, job.evaluation.fingerprint)
        job.fabric.barrier()


def _gather(job: Job, values: Tensor, count: int) -> Tensor:
    """Return all ranks' values by window, `[windows, count, ...]`, from this rank's, `count` a window, in a row."""
    rows = values.unflatten(0, (-1, count)).to(job.runner.device)
    return job.ranks.gather(rows, len(job.evaluation.tokens)).cpu()


def _full_precision(job: Job) -> dict[str, Tensor]:
    """Return what is kept of the full-precision model on this rank's windows, in a row."""
    job.run.open()  # the first rank has written it since the others read which files are complete
    tensors = job.run.load_tensors(PREDICTIONS, job.evaluation.fingerprint)
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
    if "sentence" in job.metrics and "divergence" in job.metrics:
        logger.info("perplexity of the checkpoint: found in metrics.json, skipped")
        return
    job.release_model()
    with job.metrics.stage("packed"):
        model = load(
            job.run.packed, dtype=torch.float32
        )  # for what is not packed; autocast lowers it as the precision says
        streamed = StreamedModel(model, job.runner)
        kept, tokens = _full_precision(job), job.shard(job.evaluation.tokens)
        comparison = Comparison(TopPredictions(kept["tokens"], kept["log_probabilities"]))
        with RoutingRecorder() as routing:
            job.metrics["perplexity"]["quantized"] = perplexity(
                streamed, tokens, "packed", comparison.add, job.progress.track, routing.watch
            )
        found = torch.stack([torch.cat(comparison.divergences), torch.cat(comparison.agreements).double()], -1)
        divergences, agreements = _gather(job, found, tokens.shape[1] - 1).flatten(0, 1).unbind(-1)
        if (agreement := _routing_agreement(job, routing.chosen(), kept)) is not None:
            job.metrics["routing_agreement"] = agreement
        job.metrics["divergence"] = statistics(divergences, agreements)
        model.base_model.to(job.runner.device)
        try:
            job.metrics["sentence"] = continue_text(model, job.tokenizer, PROMPT)
        except GENERATION_ERRORS as error:
            job.metrics["sentence"] = None
            job.metrics.note(f"the checkpoint's sample sentence could not be written: {named_first_line(error)}")
