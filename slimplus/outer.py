"""Embedding and output head, the large layers outside the blocks: quantized last, if the recipe gives them bits."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace

from torch import Tensor
from transformers import PretrainedConfig

from slimplus.errors import InputError
from slimplus.job import Job
from slimplus.models.architectures import find_outer_layers
from slimplus.quantization.linear import quantize_vocabulary
from slimplus.quantization.packing import pack
from slimplus.quantization.salience import HessianAccumulator
from slimplus.training.block import load_packed_block

logger = logging.getLogger(__name__)


def quantize_outer_layers(job: Job) -> dict[str, dict[str, Tensor]]:
    """The packed tensors of embedding and head by the layers' names, on the first rank; every rank takes part.

    The head is quantized with the Hessian of what the quantized blocks feed it, by the recipe's method: on SmolLM2 that
    leaves a quarter of the output error that rounding to nearest gives at 4 bits.

    Raises:
        InputError: if the Hessian of the head's inputs cannot be inverted.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    model, quantization = job.model.model, job.quantizer.quantization
    trained_norms = {name: tensor for name, tensor in (job.tuned or {}).items() if name in model.state_dict()}
    model.load_state_dict(trained_norms, strict=False)
    for name, bits in job.outer_bits.items():
        calibrated = model.get_submodule(name) is job.model.head and quantization.method != "rtn"
        hessian = _head_hessian(job) if calibrated else None
        if job.fabric.is_global_zero:
            logger.info("%s: %d bits", name, bits)
            weight = model.get_parameter(f"{name}.weight")
            try:
                packed[name] = pack(quantize_vocabulary(weight, hessian, replace(quantization, bits=bits)))
            except ValueError as error:
                raise InputError(f"{name}: {error}; finished blocks are kept") from error
    return packed


def packed_config(job: Job) -> PretrainedConfig:
    """The configuration of the packed model: a head with bits of its own is no longer tied to the embedding."""
    config = deepcopy(job.model.model.config)
    if job.outer_bits and find_outer_layers(job.model.model).head in job.outer_bits:
        config.tie_word_embeddings = False
    return config


def _head_hessian(job: Job) -> Tensor:
    """Of the head's inputs behind the quantized blocks, summed over all ranks' windows on the first rank."""
    tokens, runner = job.shard(job.calibration.tokens), job.runner
    inputs = job.model.block_inputs(tokens, runner)
    hidden = inputs.hidden
    job.run.open()  # the first rank has written blocks since the others read which files are complete
    for index, (block, arguments) in enumerate(zip(job.model.blocks, inputs.arguments, strict=True)):
        tensors, _ = job.finished_block(index)
        packed = load_packed_block(block, tensors, job.quantizer.quantization.group_size)
        hidden = runner.run(runner.load(packed), hidden, arguments)
    accumulator = HessianAccumulator(job.model.head.in_features, runner.device)
    job.model.watch_head(tokens, hidden, runner, accumulator.add)
    job.quantizer.ranks.sum_on(0, accumulator.total)
    accumulator.tokens *= job.quantizer.ranks.count
    return accumulator.hessian
