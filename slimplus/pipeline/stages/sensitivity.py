"""The stage that measures, before any block is quantized, how much each group's width matters to the model's loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from slimplus.blockwise.data import BlockData, search_windows
from slimplus.blockwise.sensitivity import OutputGradient, block_sensitivity
from slimplus.models.architectures import quantized_linears, stack_of_layers
from slimplus.models.precision import with_remedy
from slimplus.pipeline.job import Job
from slimplus.quantization.knapsack import costs_and_budget
from slimplus.quantization.stack_allocation import allocate_stacks
from slimplus.run_dir.directory import SENSITIVITY
from slimplus.utils.errors import InputError

logger = logging.getLogger(__name__)


def measure_sensitivity(job: Job) -> None:
    """Measure the sensitivity of every group and find the widths that it leads to, if the recipe asks for either.

    Raises:
        InputError: if the model's predictions or a Hessian hold NaN or infinity, or a Hessian cannot be inverted.
    """
    if not job.recipe.measures_sensitivity:
        return
    tables = job.run.load_tensors(SENSITIVITY, "")
    if tables is None:
        with job.metrics.stage("sensitivity"):
            tables = _measure(job)
            if job.fabric.is_global_zero:
                job.run.save_tensors(SENSITIVITY, tables, "")
            job.fabric.barrier()
    else:
        logger.info("sensitivity: found in %s, skipped", SENSITIVITY)
    job.channels = tables["channels"]
    if job.recipe.quantization.allocates_by == "model":
        job.allocation = _allocate(job, tables)


def _measure(job: Job) -> dict[str, Tensor]:
    """Return the sensitivity `[widths, groups]` of every linear layer by name, and `channels` `[blocks, hidden]`."""
    try:
        return _run_backwards(job)
    except ValueError as error:
        raise InputError(f"sensitivity: {with_remedy(error, job.runner.precision)}") from error


def _run_backwards(job: Job) -> dict[str, Tensor]:
    """Run the full-precision model forwards and then backwards, one block at a time on the device."""
    tokens = job.shard(job.calibration.tokens)
    ranks, runner, settings = job.ranks, job.runner, job.settings
    windows = search_windows(ranks, tokens)
    inputs = job.model.block_inputs(tokens[:windows])
    hidden = [inputs.hidden, *job.model.forward_blocks(inputs)]
    gradients = torch.zeros(windows, *inputs.hidden.shape[1:])
    for window in range(windows):
        seed = job.recipe.seed + window * ranks.count + ranks.rank
        span = slice(window, window + 1)
        gradients[span] = job.model.sampled_gradient(tokens[span], hidden[-1][span], seed).cpu()
    tables, channels = {}, []
    for index, block in job.model.stream(job.progress.track, backwards=True):
        salience = gradients.square().sum((0, 1)).double().to(runner.device)  # ranks sum on their devices
        channels.append(ranks.sum(salience).float().cpu())
        data = BlockData(runner.load(block), hidden[index], inputs.arguments[index], runner, ranks)
        own, gradients = block_sensitivity(data, windows, _output_gradient(gradients), settings)
        for name, table in own.items():
            tables[f"{job.block_names[index]}.{name}"] = table.cpu()
    return tables | {"channels": torch.stack(channels[::-1])}


def _output_gradient(gradients: Tensor) -> OutputGradient:
    """Return the function that looks up a window's gradient in `[windows, sequence_length, hidden]`."""
    return lambda window, output: gradients[window : window + 1].to(output.device, output.dtype)


def _allocate(job: Job, tables: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the widths by layer that have the smallest summed sensitivity; `check_widths` made sure that some fit."""
    settings, size = job.settings, job.recipe.quantization.size_bytes
    layers = quantized_linears(job.model.model)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    costs, budget = costs_and_budget(
        shapes, settings.bits, settings.group_size, settings.widths, size, settings.scale_bits
    )
    losses = {name: tables[name] for name in shapes}
    try:
        stack = stack_of_layers(job.model.model)
        found = allocate_stacks(
            losses, costs, settings.widths, budget, exact=size is None, stack=stack, per_layer=settings.per_layer
        )
    except ValueError as error:
        raise InputError(f"quantization.allocation: {error}") from error
    job.metrics["allocation_gap"] = found.gap
    return {name: bits.tolist() for name, bits in found.bits.items()}
