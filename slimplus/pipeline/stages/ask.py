"""The stages that ask the full-precision model, and the packed checkpoint as it loads back: tasks and prompts.

Both models are whole on the device, in the dtype that they are stored in, as users run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from slimplus.evaluation.answers import answer, degeneration, figures
from slimplus.evaluation.tasks import LoadedTasks, score
from slimplus.hub.checkpoint import load
from slimplus.models.loading import build_on_meta
from slimplus.pipeline.configs import ASK_FULL_PRECISION, ASK_PACKED
from slimplus.pipeline.job import Job
from slimplus.pipeline.memory import fits_on_device, has_room
from slimplus.pipeline.stages.evaluate import GENERATION_ERRORS
from slimplus.utils.errors import InputError, named_first_line
from slimplus.utils.units import format_bytes

logger = logging.getLogger(__name__)


def ask_full_precision(job: Job) -> None:
    """Ask the full-precision model; one that is larger than the machine's memory is left out, and that is noted.

    Raises:
        InputError: if there are tasks, and the model does not fit on the device.
    """
    generation = job.metrics.get("generation", {})
    if generation and "full" not in generation:
        weights = job.source.whole_bytes(build_on_meta(job.source.config()))
        if not job.fabric.broadcast(has_room(weights, job.runner.device)):  # processes may find more or less free
            generation["full"] = None
            job.metrics.note(
                f"evaluation.prompts: the full-precision model was not asked; it takes {format_bytes(weights)}, more "
                "than this machine has free"
            )
    _ask(job, "full", job.source.model)


def ask_packed(job: Job) -> None:
    """Ask the packed checkpoint, and warn if its answers degenerate."""
    _ask(job, "quantized", lambda: load(job.run.packed, dtype="auto"))
    generation = job.metrics.get("generation")
    if job.fabric.is_global_zero and generation and (sentence := degeneration(generation)):
        job.metrics.note(sentence)
        job.metrics.save()


def _ask(job: Job, name: str, make: Callable[[], PreTrainedModel]) -> None:
    """Ask a model what it has not been asked yet; the first process does."""
    tasks = job.tasks if job.tasks and name not in job.metrics["tasks"]["scores"] else None
    prompts = "generation" in job.metrics and name not in job.metrics["generation"]
    if not (tasks or prompts):
        return
    job.release_model()
    with job.metrics.stage(ASK_FULL_PRECISION if name == "full" else ASK_PACKED):
        if job.fabric.is_global_zero:
            model = make().eval()
            fits = fits_on_device(model.get_memory_footprint(), job.runner.device)
            model.to(job.runner.device if fits else "cpu")
            if tasks:
                _score(job, name, model, tasks)
            if prompts:
                _answer(job, name, model)
        job.fabric.barrier()


def _score(job: Job, name: str, model: PreTrainedModel, tasks: LoadedTasks) -> None:
    """Have a model do the tasks."""
    if model.device.type != job.runner.device.type:
        raise InputError(
            f"evaluation.tasks: the model takes {format_bytes(model.get_memory_footprint())}, more than the device has "
            "free; leave them out, and run `slimplus evaluate` on a larger device"
        )
    told = partial(job.progress.reach, unit="request")
    job.metrics["tasks"]["scores"][name] = score(model, job.tokenizer, tasks, told)
    job.metrics.checkpoint()


def _answer(job: Job, name: str, model: PreTrainedModel) -> None:
    """Have a model answer the prompts."""
    generation: dict[str, Any] = job.metrics["generation"]
    try:
        answers = answer(model, job.tokenizer, generation["prompts"], generation["new_tokens"])
        generation[name] = figures(answers)
    except GENERATION_ERRORS as error:
        generation[name] = None
        job.metrics.note(f"the prompts could not be answered, {name}: {named_first_line(error)}")
