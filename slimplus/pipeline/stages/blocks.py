"""The stage that quantizes the transformer blocks, one after the other."""

from __future__ import annotations

import logging
from copy import deepcopy

import torch
from torch import Tensor, nn

from slimplus.blockwise.quantizer import BlockTask
from slimplus.blockwise.swap import load_packed_block, packed_block, packed_tensors
from slimplus.models.architectures import following_norm
from slimplus.models.block_arguments import BlockArguments
from slimplus.pipeline.job import Job
from slimplus.run_dir.directory import Record, lineage
from slimplus.training.reconstruction import LossContext

logger = logging.getLogger(__name__)


def quantize_blocks(job: Job) -> None:
    """Quantize the blocks in order, each on what the quantized blocks before it give.

    1. Embed the calibration windows, which gives the inputs of the first block.
    2. For each block, run the full-precision block on the outputs of the full-precision blocks before it, which gives
       the targets of its training.
    3. Quantize the block on the outputs of the quantized blocks before it: bits, scales and zero points, training,
       packing.
    4. Save the packed block; a block that an earlier start of the run saved is loaded instead.
    5. Run the packed block on the outputs of the quantized blocks before it, which gives the inputs of the next block.

    Raises:
        InputError: if a Hessian cannot be inverted, or the device's memory does not suffice.
    """
    count = len(job.block_names)
    found = job.run.finished_blocks(count)
    if any(found):
        logger.info("blocks: %d of %d found in %s, skipped", sum(found), count, job.run.blocks)
    if all(found):
        return
    job.forget_checkpoint()
    with job.metrics.stage("blocks"):
        inputs = job.model.block_inputs(job.shard(job.calibration.tokens))
        full, all_arguments = inputs.hidden, inputs.arguments
        quantized, parent_hash = full, ""
        del inputs  # so that the first block's inputs are freed once the second one's are there
        for index, block in job.model.stream(job.progress.track):
            arguments = all_arguments[index]
            original = job.runner.load(block)
            needs_targets = job.quantizer.trains or job.settings.error_propagation
            targets = job.runner.run(original, full, arguments) if needs_targets else full
            if (stored := _stored_block(job, index, parent_hash)) is not None:
                packed = load_packed_block(block, stored, job.settings.group_size)
                parent_hash = lineage(parent_hash, stored)
                job.progress.discount()
            else:
                task = _task(job, index, original, arguments, full, quantized, targets, parent_hash)
                weights, record = job.quantizer(task)
                packed = packed_block(block, weights)
                parent_hash = _save_block(job, index, packed_tensors(packed), record, parent_hash)
            quantized = job.runner.run(job.runner.load(packed), quantized, arguments)
            full = targets


def _task(
    job: Job,
    index: int,
    original: nn.Module,
    arguments: BlockArguments,
    full: Tensor,
    hidden: Tensor,
    targets: Tensor,
    parent_hash: str,
) -> BlockTask:
    """Return what the quantizer of blocks needs for the block `original`.

    Args:
        job: the job.
        index: number of the block.
        original: the full-precision block.
        arguments: its other arguments.
        full: its inputs behind full-precision blocks.
        hidden: its inputs behind quantized blocks.
        targets: its outputs for `full`.
        parent_hash: hash of the blocks before it.
    """
    needs_auxiliary = job.quantizer.trains and job.quantizer.reconstruction.loss.auxiliary > 0
    return BlockTask(
        block=original,
        name=f"block_{index:03d}",
        arguments=arguments,
        hidden=hidden,
        targets=targets,
        auxiliary=job.runner.run(original, hidden, arguments) if needs_auxiliary else None,
        bits=_given_bits(job, index),
        context=_loss_context(job, index),
        checkpoints=job.run.block_checkpoints(index, parent_hash),
        full_hidden=full if job.settings.error_propagation else None,
    )


def _given_bits(job: Job, index: int) -> dict[str, Tensor] | None:
    """Return the widths of a block's groups by layer, or None if the quantizer of blocks finds them."""
    if job.allocation is None:
        return None
    prefix = f"{job.block_names[index]}."
    return {
        name.removeprefix(prefix): torch.tensor(widths, dtype=torch.int32)
        for name, widths in job.allocation.items()
        if name.startswith(prefix)
    }


def _loss_context(job: Job, index: int) -> LossContext:
    """Return what the loss needs to know of a block's place in the model."""
    norm = None
    if job.quantizer.trains and job.quantizer.reconstruction.loss.error == "after_norm":
        norm = deepcopy(following_norm(job.model.model, index, job.model.block)).to(job.runner.device, torch.float32)
    return LossContext(norm, None if job.channels is None else job.channels[index].to(job.runner.device))


def _stored_block(job: Job, index: int, parent_hash: str) -> dict[str, Tensor] | None:
    """Return the tensors of a finished block, or None if it was not made from the blocks before it."""
    if not job.run.has_block(index):
        return None
    tensors, record = job.run.load_block(index)
    if record["made_from"] == parent_hash:
        return tensors
    job.metrics.note(f"block {index} was made from other blocks than those that precede it; it is made again")
    return None


def _save_block(job: Job, index: int, tensors: dict[str, Tensor], record: Record, parent_hash: str) -> str:
    """Save a finished block from the first rank, since all ranks hold the same, and return its lineage."""
    own_hash = lineage(parent_hash, tensors)
    if job.fabric.is_global_zero:
        job.run.save_block(index, tensors, record | {"made_from": parent_hash, "chain": own_hash})
    job.metrics.checkpoint()
    job.fabric.barrier()
    return own_hash
