"""The stage that trains grids and norms through the whole model, with the integers of the finished blocks frozen."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimplus.blockwise.swap import load_packed_block, packed_tensors
from slimplus.models.architectures import text_norms
from slimplus.nn import FakeQuantizedLinear, PackedLinear
from slimplus.nn.fake_quantized import ScaledLinear
from slimplus.pipeline.configs import end_to_end_config
from slimplus.pipeline.job import Job
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
        with job.metrics.stage("end_to_end"):
            found = _train(job, parent_hash)
    else:
        logger.info("end_to_end: found in %s, skipped", job.run.root)
    job.tuned, job.metrics["end_to_end"] = found


def training_hash(job: Job) -> str:
    """Return the hash of what the training starts from: the finished blocks, and the keys that change its result."""
    job.run.open()  # the first rank has written blocks since the others read which files are complete
    keys = job.recipe.end_to_end.model_dump_json(exclude={"accumulate_grad_batches", "activation_checkpointing"})
    return digest(job.run.last_lineage(len(job.block_names)) + keys)


def _train(job: Job, parent_hash: str) -> tuple[dict[str, Tensor], Record]:
    """Train the finished blocks together, save the tensors by their names in the packed model, and return them."""
    settings = job.recipe.end_to_end
    tokens = job.shard(job.calibration.tokens)
    states: tuple[Tensor, ...] = ()
    teacher = None
    if settings.distillation or settings.hidden_states:
        if settings.teacher == "cached":
            states = (_head_inputs(job, tokens),)
        else:
            teacher = Teacher(job.source.model(), settings.teacher, job.runner.device, job.runner.precision)
    module = EndToEnd(_student(job), teacher, end_to_end_config(settings), job.runner.precision)
    checkpoints = job.run.end_to_end_checkpoints(parent_hash)
    data = (tokens, *states)
    fit = Fit(module, data, END_TO_END, checkpoints, job.fabric, job.quantizer.fit, job.preemption, job.progress.step)()
    events = list(fit.events)
    if not fit.helped:
        events.append("training ended above the loss it began with; the blocks stay as they were")
        logger.warning("end to end: %s", events[-1])
        module = EndToEnd(_student(job), None, end_to_end_config(settings), job.runner.precision)
    tuned = _tuned_tensors(module.to("cpu").model, job.model.dtype)
    record = {"loss": fit.loss, "before": fit.calibrated_loss, "skipped_steps": fit.skipped, "events": events}
    if job.fabric.is_global_zero:
        job.run.save_tuned(tuned, parent_hash, record)
    job.fabric.barrier()
    job.release_model()  # training replaced its blocks
    return tuned, record


def _head_inputs(job: Job, tokens: Tensor) -> Tensor:
    """Return the inputs of the full-precision model's head, `[windows, sequence_length, hidden]`, on the CPU."""
    kept: list[Tensor] = []
    hidden = job.model.last_hidden(job.model.block_inputs(tokens))
    job.model.capture_head_inputs(tokens, hidden, lambda states: kept.append(states.to("cpu", job.runner.hidden_dtype)))
    return torch.cat(kept)


def _student(job: Job) -> PreTrainedModel:
    """Return the model with the finished blocks in it, their linear layers fake-quantized.

    The job's full-precision model is released, because the blocks are put into it.
    """
    job.release_model()
    model = job.model.model
    kind = FakeQuantizedLinear if job.recipe.end_to_end.zero_points else ScaledLinear
    for index, name in enumerate(job.block_names):
        tensors, _ = job.run.load_block(index)
        block = load_packed_block(model.get_submodule(name), tensors, job.settings.group_size)
        for layer_name, layer in list(block.named_modules()):
            if isinstance(layer, PackedLinear):
                block.set_submodule(layer_name, kind(layer.quantized_weight(), layer.bias))
        model.set_submodule(name, block.float())
    return model


def _tuned_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the packed layers and the norms of a trained model by their names in the packed model.

    Norms and biases are stored in `dtype`.
    """
    tensors = {}
    norms = set(text_norms(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear):
            bias = None if module.bias is None else module.bias.to(dtype)
            packed = nn.ModuleDict({"layer": PackedLinear.from_quantized(module.quantized_weight(), bias)})
            for key, tensor in packed_tensors(packed).items():
                tensors[f"{name}.{key.removeprefix('layer.')}"] = tensor.cpu()
        elif module in norms:
            for key, parameter in module.named_parameters(recurse=False):
                tensors[f"{name}.{key}"] = parameter.detach().to("cpu", dtype)
    return tensors
