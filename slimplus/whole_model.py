"""The stages that see the whole model: the sensitivity of every group before the blocks, the training after them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimplus.errors import InputError
from slimplus.fingerprint import digest
from slimplus.job import Job
from slimplus.models.architectures import is_norm, quantized_linears
from slimplus.nn import FakeQuantizedLinear, PackedLinear
from slimplus.nn.fake_quantized import ScaledLinear
from slimplus.progress import track
from slimplus.quantization.budget import allocate, costs_and_budget
from slimplus.run import Record
from slimplus.training.block import BlockData, load_packed_block, packed_tensors, search_windows
from slimplus.training.checkpoints import END_TO_END
from slimplus.training.end_to_end import EndToEnd, EndToEndConfig
from slimplus.training.fit import Fit
from slimplus.training.optimizers import RateConfig
from slimplus.training.sensitivity import OutputGradient, backward_statistics, block_tables
from slimplus.training.teacher import Teacher

logger = logging.getLogger(__name__)

WARMUP = 4  # steps: Adam's first moments are those of single batches


def measure(job: Job) -> dict[str, Tensor]:
    """Sensitivity `[widths, groups]` of every linear layer by its name in the model, and `channels` `[blocks, hidden]`.

    The full-precision model is run forwards and then backwards, one block at a time on the device.

    Raises:
        InputError: if its predictions or a Hessian hold NaN or infinity, or a Hessian cannot be inverted.
    """
    try:
        return _measure(job)
    except ValueError as error:
        raise InputError(f"sensitivity: {error}") from error


def _measure(job: Job) -> dict[str, Tensor]:
    tokens = job.shard(job.calibration.tokens)
    ranks, runner, settings = job.quantizer.ranks, job.runner, job.quantizer.quantization
    windows = search_windows(ranks, tokens)
    inputs = job.model.block_inputs(tokens[:windows], runner)
    hidden = [inputs.hidden]
    for block, arguments in zip(job.model.blocks, inputs.arguments, strict=True):
        hidden.append(runner.run(runner.load(block), hidden[-1], arguments))
    gradients = torch.zeros(windows, *inputs.hidden.shape[1:])
    for window in range(windows):
        seed = job.recipe.seed + window * ranks.count + ranks.rank
        span = slice(window, window + 1)
        gradients[span] = job.model.sampled_gradient(tokens[span], hidden[-1][span], runner, seed).cpu()
    tables, channels = {}, []
    for index in track(list(reversed(range(job.block_count))), "sensitivity"):
        salience = gradients.square().sum((0, 1)).double().to(runner.device)  # where the ranks can sum it
        channels.append(ranks.sum(salience).float().cpu())
        data = BlockData(runner.load(job.model.blocks[index]), hidden[index], inputs.arguments[index], runner, ranks)
        statistics, gradients = backward_statistics(data, windows, _given(gradients))
        for name, table in block_tables(data, statistics, settings.widths, settings).items():
            tables[f"{job.block_names[index]}.{name}"] = table.cpu()
    return tables | {"channels": torch.stack(channels[::-1])}


def _given(gradients: Tensor) -> OutputGradient:
    return lambda window, output: gradients[window : window + 1].to(output.device, output.dtype)


def allocate_model(job: Job, tables: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Widths by layer that keep the summed sensitivity the smallest; `check_budget` has seen that there are any."""
    settings, size = job.quantizer.quantization, job.recipe.quantization.size_bytes
    layers = quantized_linears(job.model.model)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    costs, budget = costs_and_budget(
        shapes, settings.bits, settings.group_size, settings.widths, size, settings.scale_bits
    )
    losses = {name: tables[name] for name in shapes}
    try:
        found = allocate(losses, costs, settings.widths, budget, exact=size is None)
    except ValueError as error:
        raise InputError(f"quantization.allocation: {error}") from error
    job.metrics["allocation_gap"] = found.gap
    return {name: bits.tolist() for name, bits in found.bits.items()}


def made_from(job: Job) -> str:
    """Hash of what the training of the whole model starts from: the blocks, and those of its keys that matter."""
    job.run.open()  # the first rank has written blocks since the others read which files are complete
    keys = job.recipe.end_to_end.model_dump_json(exclude={"accumulate_grad_batches", "activation_checkpointing"})
    return digest(job.run.last_chain(job.block_count) + keys)


def result(job: Job) -> str:
    """Hash of what is exported, whether the whole model was trained or the blocks are the end of it."""
    if job.tuned is not None:
        return made_from(job)
    job.run.open()
    return job.run.last_chain(job.block_count)


def train(job: Job, made_from: str) -> tuple[dict[str, Tensor], Record]:
    """Train the finished blocks together; what comes of it, by the names of the packed model, is kept in run_dir."""
    settings = job.recipe.end_to_end
    tokens = job.shard(job.calibration.tokens)
    states: tuple[Tensor, ...] = ()
    teacher = None
    if settings.distillation or settings.hidden_states:
        if settings.teacher == "cached":
            states = (last_states(job, tokens),)
        else:
            teacher = Teacher(job.source.model(), settings.teacher, job.runner.device, job.runner.precision)
    module = EndToEnd(_student(job), teacher, end_to_end_config(job), job.runner.precision)
    fit = Fit(
        module,
        (tokens, *states),
        END_TO_END,
        job.run.end_to_end_checkpoints(made_from),
        job.fabric,
        job.quantizer.fit,
        job.quantizer.preemption,
    )()
    events = list(fit.events)
    if not fit.helped:
        events.append("training ended above the loss it began with; the blocks stay as they were")
        logger.warning("end to end: %s", events[-1])
        module = EndToEnd(_student(job), None, end_to_end_config(job), job.runner.precision)
    tuned = tuned_tensors(module.to("cpu").model, job.model.dtype)
    record = {"loss": fit.loss, "before": fit.calibrated_loss, "skipped_steps": fit.skipped, "events": events}
    if job.fabric.is_global_zero:
        job.run.save_tuned(tuned, made_from, record)
    job.fabric.barrier()
    job.release_model()  # it is the trained one now
    return tuned, record


def end_to_end_config(job: Job) -> EndToEndConfig:
    """The training of the whole model as the recipe has it."""
    recipe = job.recipe.end_to_end
    return EndToEndConfig(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        accumulate_grad_batches=recipe.accumulate_grad_batches,
        optimizer=recipe.optimizer,
        grid=RateConfig(recipe.learning_rate, "cosine"),
        norms=RateConfig(recipe.norm_learning_rate, "cosine"),
        warmup=WARMUP,
        next_token=recipe.next_token,
        distillation=recipe.distillation,
        hidden_states=recipe.hidden_states,
        activation_checkpointing=recipe.activation_checkpointing,
    )


def last_states(job: Job, tokens: Tensor) -> Tensor:
    """What the full-precision model's head reads, `[windows, sequence_length, hidden]`, on the CPU."""
    runner, kept = job.runner, []
    inputs = job.model.block_inputs(tokens, runner)
    hidden = inputs.hidden
    for block, arguments in track(list(zip(job.model.blocks, inputs.arguments, strict=True)), "teacher"):
        hidden = runner.run(runner.load(block), hidden, arguments)
    job.model.watch_head(tokens, hidden, runner, lambda states: kept.append(states.to("cpu", runner.hidden_dtype)))
    return torch.cat(kept)


def _student(job: Job) -> PreTrainedModel:
    """The model with the finished blocks, their linear layers fake-quantized; what it was before is gone."""
    job.release_model()
    model, settings = job.model.model, job.quantizer.quantization
    kind = FakeQuantizedLinear if job.recipe.end_to_end.zero_points else ScaledLinear
    for index, name in enumerate(job.block_names):
        tensors, _ = job.run.load_block(index)
        block = load_packed_block(model.get_submodule(name), tensors, settings.group_size)
        for layer_name, layer in list(block.named_modules()):
            if isinstance(layer, PackedLinear):
                block.set_submodule(layer_name, kind(layer.quantized_weight(), layer.bias))
        model.set_submodule(name, block.float())
    return model


def tuned_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is saved of a trained model, by the packed model's names: packed layers; norms and biases in `dtype`."""
    tensors = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear):
            bias = None if module.bias is None else module.bias.to(dtype)
            packed = nn.ModuleDict({"layer": PackedLinear.from_quantized(module.quantized_weight(), bias)})
            for key, tensor in packed_tensors(packed).items():
                tensors[f"{name}.{key.removeprefix('layer.')}"] = tensor.cpu()
        elif is_norm(module):
            for key, parameter in module.named_parameters(recurse=False):
                tensors[f"{name}.{key}"] = parameter.detach().to("cpu", dtype)
    return tensors
