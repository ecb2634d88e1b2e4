"""The whole job: text → windows → block inputs → bits, scales → trained quantizers → packed checkpoint."""

from __future__ import annotations

import logging

import torch

from slimplus import report, whole_model
from slimplus.config import Recipe, to_yaml
from slimplus.evaluation import continue_text, perplexity
from slimplus.files import staging_folder
from slimplus.hub.checkpoint import load, write_checkpoint
from slimplus.hub.quantizer import SlimplusConfig
from slimplus.job import Job, model_source, prepare, start
from slimplus.models.architectures import outer_bits
from slimplus.models.loading import build_on_meta
from slimplus.models.streaming import StreamedModel
from slimplus.outer import packed_config, quantize_outer_layers
from slimplus.plan import make_plan
from slimplus.progress import track
from slimplus.run import SENSITIVITY, chain, locked, write_allocation
from slimplus.shapes import check_shapes, planned_widths
from slimplus.signals import Preemption
from slimplus.training.block import load_packed_block, packed_block, packed_tensors
from slimplus.training.blockwise import BlockTask
from slimplus.training.processes import watched

logger = logging.getLogger(__name__)

PROMPT = "The history of the city begins"


def run(recipe: Recipe) -> str | None:
    """Quantize a model as `recipe` says; whatever `run_dir` already holds of it is skipped.

    Returns:
        The summary, on the first rank.

    Raises:
        InputError: for input the user can put right.
        TemporaryFailure: for what passes, such as a lost process.
        Preempted: after SIGTERM or SIGUSR1.
    """
    fabric = start(recipe)
    with Preemption() as preemption, watched(fabric), locked(recipe.run_dir, fabric.is_global_zero):
        job = prepare(recipe, fabric, preemption)
        measure_full_precision(job)
        measure_sensitivity(job)
        quantize_blocks(job)
        train_end_to_end(job)
        export(job)
        sentence = measure_packed(job)
        return finish(job, sentence)


def dry_run(recipe: Recipe) -> str:
    """The plan of a run, from the model's shapes alone: no weights are read.

    Raises:
        InputError: if the model's configuration cannot be had.
    """
    source, settings = model_source(recipe), recipe.quantization
    config = source.config_of(recipe.model.config) if recipe.model.config else source.config()
    model = build_on_meta(config)
    check_shapes(model, recipe)
    calibration, length = (recipe.data.samples, recipe.data.sequence_length), recipe.data.evaluation.sequence_length
    outer = outer_bits(model, settings.embedding_bits, settings.head_bits)
    grid = (*planned_widths(model, recipe), settings.group_size, settings.scale_bits)
    return str(make_plan(model, *grid, outer, calibration, length, _whole_bytes(recipe)))


def _whole_bytes(recipe: Recipe) -> int:
    """Bytes of a weight while the whole model is trained: the integer, and what the backward pass multiplies by."""
    if not recipe.end_to_end.epochs:
        return 0
    kept = 4 if recipe.trainer.precision == "32-true" else 2
    return 1 if recipe.end_to_end.activation_checkpointing else 1 + kept


def measure_full_precision(job: Job) -> None:
    """Perplexity of the model as it is."""
    if "full" in job.metrics["perplexity"]:
        logger.info("perplexity at full precision: found in metrics.json, skipped")
        return
    with job.stage("full_precision"):
        job.metrics["perplexity"]["full"] = perplexity(
            job.model, job.shard(job.evaluation.tokens), job.runner, "full precision"
        )


def measure_sensitivity(job: Job) -> None:
    """How much each group's width matters to the model's loss, and the widths that follow, where the recipe asks."""
    if not job.measures_sensitivity:
        return
    tables = job.run.load_tensors(SENSITIVITY, "")
    if tables is None:
        with job.stage("sensitivity"):
            tables = whole_model.measure(job)
            if job.fabric.is_global_zero:
                job.run.save_tensors(SENSITIVITY, tables, "")
            job.fabric.barrier()
    else:
        logger.info("sensitivity: found in %s, skipped", SENSITIVITY)
    job.channels = tables["channels"]
    if job.recipe.quantization.allocates_by == "model":
        job.allocation = whole_model.allocate_model(job, tables)


def quantize_blocks(job: Job) -> None:
    """Quantize the blocks in order, each on what the quantized ones before it give; finished ones are replayed."""
    found = job.run.finished_blocks(job.block_count)
    if any(found):
        logger.info("blocks: %d of %d found in %s, skipped", sum(found), len(found), job.run.blocks)
    if all(found):
        return
    job.forget_checkpoint()
    made_from = ""
    with job.stage("blocks"):
        inputs = job.model.block_inputs(job.shard(job.calibration.tokens), job.runner)
        full, all_arguments = inputs.hidden, inputs.arguments
        quantized = full
        del inputs  # so that the first block's inputs go when the second one's are there
        for index, block in track(list(enumerate(job.model.blocks)), "quantizing"):
            arguments = all_arguments[index]
            original = job.runner.load(block)
            targets = job.runner.run(original, full, arguments) if job.quantizer.trains else full
            if (stored := job.stored_block(index, made_from)) is not None:
                packed = load_packed_block(block, stored, job.quantizer.quantization.group_size)
                made_from = chain(made_from, stored)
            else:
                auxiliary = job.runner.run(original, quantized, arguments) if job.needs_auxiliary else None
                weights, record = job.quantizer(
                    BlockTask(
                        block=original,
                        name=f"block_{index:03d}",
                        arguments=arguments,
                        hidden=quantized,
                        targets=targets,
                        auxiliary=auxiliary,
                        bits=job.given_bits(index),
                        surroundings=job.surroundings(index),
                        checkpoints=job.run.block_checkpoints(index, made_from),
                    )
                )
                packed = packed_block(block, weights)
                made_from = job.save_block(index, packed_tensors(packed), record, made_from)
            quantized = job.runner.run(job.runner.load(packed), quantized, arguments)
            full = targets


def train_end_to_end(job: Job) -> None:
    """Train grids and norms through the whole model, if the recipe has epochs for it."""
    if not job.recipe.end_to_end.epochs:
        job.metrics.pop("end_to_end", None)  # of an earlier start
        return
    made_from = whole_model.made_from(job)
    if (found := job.run.load_tuned(made_from)) is None:
        job.forget_checkpoint()
        with job.stage("end_to_end"):
            found = whole_model.train(job, made_from)
    else:
        logger.info("end_to_end: found in %s, skipped", job.run.root)
    job.tuned, job.metrics["end_to_end"] = found


def export(job: Job) -> None:
    """Write the packed checkpoint from the block files and the tensors that are not quantized."""
    made_from = [whole_model.result(job), job.outer_bits]
    if job.metrics.get("exported_from") != made_from:
        job.forget_checkpoint()
    if job.run.has_checkpoint and "size_bytes" in job.metrics:
        logger.info("checkpoint: found in %s, skipped", job.run.packed)
        return
    with job.stage("export"):
        outer = quantize_outer_layers(job)
        if job.fabric.is_global_zero:
            layout, settings = job.packed_layout(), job.quantizer.quantization
            for name, tensors in outer.items():
                layout.add_outer(name, tensors, job.model.model.get_parameter(f"{name}.weight").shape)
            write_allocation(job.run, layout.bits, layout.outer_bits, settings.bits, settings.group_size)
            card = report.model_card(job.recipe.model.path, layout.average_bits, to_yaml(job.recipe))
            size = write_checkpoint(
                staging_folder(job.run.packed),
                job.checkpoint_tensors(outer),
                packed_config(job),
                SlimplusConfig(
                    settings.bits,
                    settings.group_size,
                    layout.bit_counts,
                    settings.method,
                    layout.shapes,
                    job.model.full_bytes,
                    settings.scale_bits,
                ),
                job.tokenizer,
                job.model.model.generation_config,
                card,
            )
            job.run.manifest.replace_folder(job.run.packed)
            job.metrics |= layout.figures(size, job.model.full_bytes) | {"exported_from": made_from}
        job.fabric.barrier()


def measure_packed(job: Job) -> str:
    """Perplexity of the checkpoint just as it loads back, and a sentence of what it writes."""
    if "sentence" in job.metrics:
        logger.info("perplexity of the checkpoint: found in metrics.json, skipped")
        return str(job.metrics["sentence"])
    job.release_model()
    with job.stage("packed"):
        model = load(job.run.packed, dtype=torch.float32)  # what is not packed; autocast makes the rest
        streamed = StreamedModel(model, job.runner.device)
        job.metrics["perplexity"]["quantized"] = perplexity(
            streamed, job.shard(job.evaluation.tokens), job.runner, "packed"
        )
        model.base_model.to(job.runner.device)
        sentence = continue_text(model, job.tokenizer, PROMPT)
        job.metrics["sentence"] = sentence
    return sentence


def finish(job: Job, sentence: str) -> str | None:
    """Write the summary, and the figures into the model card."""
    job.fabric.barrier()  # the end of the first process is the end of all
    if not job.fabric.is_global_zero:
        return None
    summary = report.summary(job.metrics, str(job.run.packed), sentence)
    job.run.write("summary.txt", summary)
    job.run.write("packed/README.md", report.with_figures((job.run.packed / "README.md").read_text(), job.metrics))
    return summary
