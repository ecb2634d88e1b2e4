"""The stages that measure perplexity: of the full-precision model, and of the packed checkpoint as it loads back."""

from __future__ import annotations

import logging

import torch

from slimplus.evaluation.generation import continue_text
from slimplus.evaluation.perplexity import perplexity
from slimplus.hub.checkpoint import load
from slimplus.models.streaming import StreamedModel
from slimplus.pipeline.job import Job
from slimplus.utils.errors import named_first_line

logger = logging.getLogger(__name__)

PROMPT = "The history of the city begins"
# What `generate` and tokenizers raise, some of which belong to the model: the figures of a finished run matter more.
GENERATION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)


def measure_full_precision(job: Job) -> None:
    """Measure the perplexity of the full-precision model."""
    if "full" in job.metrics["perplexity"]:
        logger.info("perplexity at full precision: found in metrics.json, skipped")
        return
    with job.metrics.stage("full_precision"):
        job.metrics["perplexity"]["full"] = perplexity(job.model, job.shard(job.evaluation.tokens), "full precision")


def measure_packed(job: Job) -> None:
    """Measure the perplexity of the checkpoint as it loads back, and let the loaded model write a sentence."""
    if "sentence" in job.metrics:
        logger.info("perplexity of the checkpoint: found in metrics.json, skipped")
        return
    job.release_model()
    with job.metrics.stage("packed"):
        model = load(
            job.run.packed, dtype=torch.float32
        )  # for what is not packed; autocast lowers it as the precision says
        streamed = StreamedModel(model, job.runner)
        job.metrics["perplexity"]["quantized"] = perplexity(streamed, job.shard(job.evaluation.tokens), "packed")
        model.base_model.to(job.runner.device)
        try:
            job.metrics["sentence"] = continue_text(model, job.tokenizer, PROMPT)
        except GENERATION_ERRORS as error:
            job.metrics["sentence"] = None
            job.metrics.note(f"the checkpoint's sample sentence could not be written: {named_first_line(error)}")
