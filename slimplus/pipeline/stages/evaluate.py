"""The stages that measure the full-precision model, and the packed checkpoint as it loads back."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from slimplus.evaluation.divergence import Comparison, Recorder, TopPredictions, statistics
from slimplus.evaluation.generation import continue_text
from slimplus.evaluation.perplexity import perplexity
from slimplus.hub.checkpoint import load
from slimplus.models.streaming import StreamedModel
from slimplus.pipeline.job import Job
from slimplus.run_dir.directory import PREDICTIONS
from slimplus.utils.errors import named_first_line

logger = logging.getLogger(__name__)

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
        recorder = Recorder()
        tokens = job.shard(job.evaluation.tokens)
        job.metrics["perplexity"]["full"] = perplexity(
            job.model, tokens, "full precision", recorder.add, job.progress.track
        )
        predictions = recorder.predictions()
        tensors = {
            "tokens": _gather(job, predictions.tokens),
            "log_probabilities": _gather(job, predictions.log_probabilities),
        }
        if job.fabric.is_global_zero:
            job.run.save_tensors(PREDICTIONS, tensors, job.evaluation.fingerprint)
        job.fabric.barrier()


def _gather(job: Job, predictions: Tensor) -> Tensor:
    """Return all ranks' values of predictions by window, `[windows, predictions, ...]`, from this rank's in a row."""
    windows, length = job.evaluation.tokens.shape
    rows = predictions.unflatten(0, (-1, length - 1)).to(job.runner.device)
    return job.ranks.gather(rows, windows).cpu()


def _comparison(job: Job) -> Comparison:
    """Return the comparison of this rank's windows with the full-precision model's predictions."""
    job.run.open()  # the first rank has written them since the others read which files are complete
    tensors = job.run.load_tensors(PREDICTIONS, job.evaluation.fingerprint)
    assert tensors is not None
    parts = {name: job.shard(tensor).flatten(0, 1) for name, tensor in tensors.items()}
    return Comparison(TopPredictions(parts["tokens"], parts["log_probabilities"]))


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
        comparison, tokens = _comparison(job), job.shard(job.evaluation.tokens)
        job.metrics["perplexity"]["quantized"] = perplexity(
            streamed, tokens, "packed", comparison.add, job.progress.track
        )
        found = torch.stack([torch.cat(comparison.divergences), torch.cat(comparison.agreements).double()], -1)
        divergences, agreements = _gather(job, found).flatten(0, 1).unbind(-1)
        job.metrics["divergence"] = statistics(divergences, agreements)
        model.base_model.to(job.runner.device)
        try:
            job.metrics["sentence"] = continue_text(model, job.tokenizer, PROMPT)
        except GENERATION_ERRORS as error:
            job.metrics["sentence"] = None
            job.metrics.note(f"the checkpoint's sample sentence could not be written: {named_first_line(error)}")
