"""The start of a run: processes, checks, texts, and what an earlier start of the run left behind."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.fabric import Fabric
from transformers import PretrainedConfig, PreTrainedModel

from slimplus.data.windows import (
    check_ids,
    texts_identity,
)
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.evaluation.tasks import load_tasks
from slimplus.models.architectures import (
    blocks_path,
    embedding_and_head_bits,
    embedding_rows,
    find_blocks,
    is_tied,
    quantized_linears,
)
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.models.location import resolve_model_folder
from slimplus.models.precision import resolve_precision
from slimplus.models.state_cache import StateCache
from slimplus.models.streaming import BlockRunner
from slimplus.models.towers import carried_over
from slimplus.pipeline.configs import block_quantizer, expected_work, task_config
from slimplus.pipeline.job import Job
from slimplus.pipeline.known_figures import note_average, start_metrics
from slimplus.pipeline.memory import cache_folder, check_needs, check_tasks, memory_needs
from slimplus.pipeline.model_checks import check_shapes, given_allocation
from slimplus.pipeline.self_check import self_check
from slimplus.pipeline.self_text import check_memory
from slimplus.pipeline.texts import draws, evaluation_texts
from slimplus.recipe.preflight import check_shares
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.directory import RunDirectory
from slimplus.run_dir.fingerprint import differences, fingerprint, library_versions
from slimplus.training.loggers import check_trackers
from slimplus.utils.progress import FILE, Progress
from slimplus.utils.units import GIGABYTE

logger = logging.getLogger(__name__)


def model_source(recipe: Recipe) -> ModelSource:
    """Return where the full-precision model of a recipe comes from.

    Raises:
        InputError: if `model.path` names a package that is not installed.
    """
    model = recipe.model
    path = resolve_model_folder(model.path)
    return ModelSource(path, model.gguf_file, model.dtype, model.trust_remote_code, model.revision)


def start(recipe: Recipe) -> Fabric:
    """Start the processes of the job that a recipe asks for."""
    trainer = recipe.trainer
    return launch(trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy)


def _state_cache(recipe: Recipe) -> StateCache:
    """Return what gives this process's hidden states their memory: its share of the machine's."""
    gigabytes, trainer = recipe.data.cache_gigabytes, recipe.trainer
    if gigabytes is None:
        return StateCache()
    return StateCache(int(gigabytes * GIGABYTE) // trainer.devices, cache_folder(recipe))


def prepare(recipe: Recipe, fabric: Fabric, preemption: Preemption, progress: Progress | None = None) -> Job:
    """Check what can be checked before the long work, read the texts, and return the job.

    Every process of the job calls this.

    Args:
        recipe: the resolved recipe.
        fabric: the processes of the job.
        preemption: the handler of this process's signals.
        progress: what is shown of the work while it runs; None for nothing.

    Raises:
        InputError: if the recipe does not fit the model, the texts, the processes or the run directory.
    """
    logging.getLogger("slimplus").setLevel(logging.INFO if fabric.is_global_zero else logging.WARNING)
    L.seed_everything(recipe.seed, verbose=False)
    check_shares(recipe, fabric.world_size)
    run = RunDirectory(recipe.run_dir)
    run.open()
    if fabric.is_global_zero:
        check_trackers(recipe.trainer.logger, run.logs)
    before = _begun_with(run)
    runner = _block_runner(recipe, fabric, before.get("trainer.precision"))
    source = _pinned_source(recipe, before.get("model.path", ""))
    source = replace(source, revision=fabric.broadcast(source.revision))  # each process may have met another commit
    config = source.config()
    goes_on = any(run.blocks.glob("*"))
    skeleton = _checked_skeleton(recipe, source, config, try_out=fabric.is_global_zero and not goes_on)
    allocation = given_allocation(skeleton, recipe)
    check_needs(memory_needs(skeleton, recipe, runner.precision), recipe, fabric.device)
    check_tasks(source.whole_bytes(skeleton), recipe, fabric.device)
    bits = _embedding_and_head_bits(recipe, source, skeleton)
    tokenizer = source.tokenizer()
    drawn = draws(recipe, tokenizer, source, runner.precision, run.tokens)
    to_write = [draw.own for draw in drawn if draw.own is not None and not draw.own.is_complete]
    for own in to_write:
        check_memory(own, skeleton, fabric.device, recipe.trainer.devices)
    identity = fingerprint(recipe, texts_identity(drawn[0].texts), tokenizer, source, config, runner.precision)
    tasks = load_tasks(task_config(recipe.evaluation)) if recipe.evaluation.tasks else None
    blocks = len(find_blocks(skeleton))
    events = _check_and_repair(run, recipe, identity, blocks) if fabric.is_global_zero else []
    fabric.barrier()
    run.open()
    with fabric.rank_zero_first():
        held_out = evaluation_texts(recipe, tokenizer, run.tokens)
    rows = embedding_rows(skeleton)
    for key, text in zip(recipe.evaluation_texts, held_out, strict=True):
        check_ids(text.tokens, rows, tokenizer, f"{key}.path")
    progress = progress or Progress(shows=False)
    progress.open(run.root / FILE, expected_work(recipe, tasks.tokens if tasks else 0))
    metrics = start_metrics(recipe, run, fabric, held_out, tasks, runner.precision, identity, events, progress)
    metrics["calibration"] = {draw.name: draw.shares for draw in drawn}
    if allocation is not None:
        note_average(metrics, recipe, allocation, skeleton)
    weights = sum(layer.weight.numel() for layer in quantized_linears(skeleton).values())
    quantizer = block_quantizer(recipe, fabric, runner, weights, run.logs, preemption, progress.step)
    for own in to_write:
        with metrics.stage("calibration_text"):
            own.write(source, run, fabric.device, quantizer.ranks, progress)
        fabric.barrier()
    with fabric.rank_zero_first():
        windows = [draw.windows(tokenizer, run.tokens) for draw in drawn]
    for each in windows:
        check_ids(each.tokens, rows, tokenizer, "data.calibration.path")
    if fabric.is_global_zero:
        run.manifest.add(run.tokens)
    return Job(
        recipe=recipe,
        run=run,
        fabric=fabric,
        ranks=quantizer.ranks,
        preemption=preemption,
        runner=runner,
        source=source,
        tokenizer=tokenizer,
        calibration=windows[0],
        end_to_end=windows[-1],
        evaluation_texts=held_out,
        tasks=tasks,
        settings=quantizer.quantization,
        quantizer=quantizer,
        block_names=[f"{blocks_path(skeleton)}.{index}" for index in range(blocks)],
        embedding_and_head_bits=bits,
        metrics=metrics,
        progress=progress,
        allocation=allocation,
    )


def _begun_with(run: RunDirectory) -> dict[str, Any]:
    """Return what identifies a run that has begun, empty for a new one."""
    damaged = run.manifest.problem(run.root / "fingerprint.json")  # `check_fingerprint` reports it
    return {} if damaged else run.read("fingerprint.json")


def _block_runner(recipe: Recipe, fabric: Fabric, before: str | None) -> BlockRunner:
    """Return what runs blocks on this process's device, in one precision on all processes.

    Args:
        recipe: the resolved recipe.
        fabric: the processes of the job.
        before: precision that the run began with, which `auto` keeps: another machine may be faster in another one.
    """
    asked = recipe.trainer.precision
    precision = before if asked == "auto" and before is not None else resolve_precision(asked, fabric.device)
    return BlockRunner(fabric.device, fabric.broadcast(precision), cache=_state_cache(recipe))


def _checked_skeleton(recipe: Recipe, source: ModelSource, config: PretrainedConfig, try_out: bool) -> PreTrainedModel:
    """Return the model without weights, once its architecture, shapes and files are found to serve the recipe.

    Args:
        recipe: the resolved recipe.
        source: where the model comes from.
        config: the model's configuration.
        try_out: whether to try the architecture on a small model; a run that goes on has passed that.
    """
    skeleton = build_on_meta(config)
    check_shapes(skeleton, recipe)
    if try_out:
        self_check(config)
    source.check_weights()
    if carried_over(skeleton):
        source.processor_files()  # which `export` copies: on this machine before the long work
    return skeleton


def _embedding_and_head_bits(recipe: Recipe, source: ModelSource, skeleton: PreTrainedModel) -> dict[str, int]:
    """Return name → bits of the layers outside the blocks that get packed.

    Where a head is to be packed alone, it must not be tied to the embedding. A file may hold a head of its own although
    the configuration says that the two are tied, so the weights decide.
    """
    embedding, head = recipe.quantization.embedding_bits, recipe.quantization.head_bits
    tied = is_tied(skeleton)
    if tied and head is not None and embedding is None:
        tied = source.is_tied()
    return embedding_and_head_bits(skeleton, tied, embedding, head)


def _pinned_source(recipe: Recipe, before: str) -> ModelSource:
    """Return where the model comes from; a hub repository is pinned to the commit that the run began with.

    Args:
        recipe: the resolved recipe.
        before: `model.path` of the fingerprint that the run began with.
    """
    source = model_source(recipe)
    path, _, commit = before.rpartition("@")
    if source.revision is None and path == source.path:
        source = replace(source, revision=commit)
    return source.pinned()


def _check_and_repair(run: RunDirectory, recipe: Recipe, identity: dict[str, Any], blocks: int) -> list[str]:
    """Check and repair what an earlier start left in `run`, and return what was done, as events of metrics.json."""
    run.check_start(recipe.resume.start, blocks)
    changes = run.check_fingerprint(identity, recipe.resume.force)
    events = [f"resume.force: {change}" for change in changes] + run.repair()
    upgrades = differences(run.read("metrics.json").get("libraries", {}), library_versions())
    if upgrades and any(run.blocks.glob("*")):
        # No error: nobody can tell whether an upgrade changes a byte, and users do not always choose the versions.
        events.append(f"libraries changed during the run: {', '.join(upgrades)}")
        logger.warning("%s; the checkpoint may differ from that of an undisturbed run", events[-1])
    return events
