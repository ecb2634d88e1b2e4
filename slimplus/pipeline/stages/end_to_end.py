"""The stage that trains grids and norms through the whole model, with the integers of the finished blocks frozen."""

from __future__ import annotations

import gc
import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimplus.blockwise.swap import load_packed_block
from slimplus.models.architectures import find_blocks, text_norms
from slimplus.models.block_loading import open_model
from slimplus.nn import FakeQuantizedLinear, PackedGridLinear, PackedLinear, PackedScaledLinear
from slimplus.pipeline.configs import TEACH, end_to_end_config
from slimplus.pipeline.job import Job
from slimplus.pipeline.memory import has_plenty
from slimplus.run_dir.directory import Record
from slimplus.run_dir.fingerprint import digest
from slimplus.training.checkpoints import END_TO_END
from slimplus.training.end_to_end import EndToEnd
from slimplus.training.fit import Fit
from slimplus.training.teacher import Teacher

logger = logging.getLogger(__name__)


def train_end_to_end(job: Job) -> None:
    """Train grids and norms through the whole model, if the recipe has epochs for it."""
    if not job.recipe.end_to_end.epochs:
        job.metrics.pop("end_to_end", None)  # an earlier start may have had epochs
        return
    parent_hash = training_hash(job)
    if (found := job.run.load_tuned(parent_hash)) is None:
        job.forget_checkpoint()
        if not job.run.end_to_end_checkpoints(parent_hash).goes_on():
            job.metrics.forget_stages(TEACH, "end_to_end")
        tokens = job.shard(job.end_to_end.tokens)
        data: tuple[Tensor, ...] = (tokens,)
        if job.recipe.end_to_end.reads_states:
            with job.metrics.stage(TEACH):
                data = tokens, _head_inputs(job, tokens)
        with job.metrics.stage("end_to_end"):
            found = _train(job, data, parent_hash)
            gc.collect()  # checkpointing made cycles, which would keep the student in memory
    else:
        logger.info("end_to_end: found in %s, skipped", job.run.root)
    job.tuned, job.metrics["end_to_end"] = found


def training_hash(job: Job) -> str:
    """Return the hash of what the training starts from: the blocks, the keys that change its result, and the text."""
    job.run.open()  # the first rank has written blocks since the others read which files are complete
    settings, unchanged = job.recipe.end_to_end, {"accumulate_grad_batches", "activation_checkpointing"}
    # The blocks' lineage tells the text already, if it is theirs.
    text = "" if settings.tokens is None else job.end_to_end.fingerprint
    keys = settings.model_dump_json(exclude=unchanged, exclude_none=True)
    return digest(job.run.last_lineage(len(job.block_names)) + keys + text)


def _train(job: Job, data: tuple[Tensor, ...], parent_hash: str) -> tuple[dict[str, Tensor], Record]:
    """Train the finished blocks together, save the tensors by their names in the packed model, and return them.

    Args:
        job: the job.
        data: this rank's tokens, and, if they are kept, the states that the full-precision model's head reads of them.
        parent_hash: hash of what the training starts from.
    """
    settings = job.recipe.end_to_end
    teacher = None
    if settings.learns_from_model and settings.teacher != "cached":
        teacher = Teacher(*open_model(job.source), settings.teacher, job.runner.device, job.runner.precision)
    module = EndToEnd(_student(job), teacher, end_to_end_config(settings), job.runner.precision)
    checkpoints = job.run.end_to_end_checkpoints(parent_hash)
    fit = Fit(module, data, END_TO_END, checkpoints, job.fabric, job.quantizer.fit, job.preemption, job.progress.step)()
    events = list(fit.events)
    if not fit.helped:
        events.append("training ended above the loss it began with; the blocks stay as they were")
        logger.warning("end to end: %s", events[-1])
    tuned = _tuned_tensors(module.model, job.model.dtype) if fit.helped else {}
    record = {"loss": fit.loss, "before": fit.calibrated_loss, "skipped_steps": fit.skipped, "events": events}
    if job.fabric.is_global_zero:
        job.run.save_tuned(tuned, parent_hash, record)
    job.fabric.barrier()
    job.release_model()  # training replaced its blocks
    return tuned, record


def _head_inputs(job: Job, tokens: Tensor) -> Tensor:
    """Return the inputs of the full-precision model's head, `[windows, sequence_length, hidden]`, on the CPU."""
    hidden = job.model.last_hidden(job.model.block_inputs(tokens), job.progress.track)
    kept = job.runner.cache.empty((*tokens.shape, job.model.head.in_features), job.runner.hidden_dtype)
    windows = iter(kept.split(1))
    job.model.capture_head_inputs(tokens, hidden, lambda states: next(windows).copy_(states))
    return kept


def _student(job: Job) -> PreTrainedModel:
    """Return the model with the finished blocks in it, their linear layers packed, with grids that learn.

    Where memory is plenty, the layers hold their integers unpacked, since unpacking takes a good part of a step on a
    CPU. Each block goes to the device as it is built. Under ZeRO stage 3 the processes share out the packed integers.

    The job's full-precision model is released, because the blocks are put into it.
    """
    job.release_model()
    model, device, ranks = job.model.model, job.runner.device, job.ranks
    learns_zero_points = job.recipe.end_to_end.zero_points and not job.settings.integer_zero_points
    kind = PackedGridLinear if learns_zero_points else PackedScaledLinear
    shares = ranks.count > 1 and job.recipe.trainer.strategy == "deepspeed_stage_3"
    weights = sum(parameter.numel() for block in find_blocks(model) for parameter in block.parameters())
    unpacked = not shares and has_plenty(weights * ranks.count, device)
    for index, original in job.model.stream():
        tensors, _ = job.run.load_block(index)
        block = load_packed_block(original, tensors, job.settings.group_size)
        for name, layer in list(block.named_modules()):
            if isinstance(layer, PackedLinear):
                block.set_submodule(name, kind(layer, ranks, index % ranks.count if shares else None, unpacked))
        model.set_submodule(job.block_names[index], block.to(device, torch.float32))
    return model


def _tuned_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what training changed, by names in the packed model: grids of packed layers, and norms, on the CPU.

    Norms and biases are stored in `dtype`.
    """
    tensors = {}
    norms = set(text_norms(model))
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizedLinear):
            for key, tensor in module.packed_grid().items():
                tensors[f"{name}.{key}"] = tensor.cpu()
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.to("cpu", dtype)
        elif module in norms:
            for key, parameter in module.named_parameters(recurse=False):
                tensors[f"{name}.{key}"] = parameter.detach().to("cpu", dtype)
    return tensors
