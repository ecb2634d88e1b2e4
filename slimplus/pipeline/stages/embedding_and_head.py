"""The quantization of the embedding and the output head, the large layers outside the blocks."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn
from transformers import PretrainedConfig

from slimplus.blockwise.quantizer import storage_warning
from slimplus.blockwise.swap import load_packed_block
from slimplus.format.planes import pack
from slimplus.models.architectures import find_embedding_and_head, set_tied
from slimplus.models.precision import with_remedy
from slimplus.pipeline.job import Job
from slimplus.quantization.linear import quantize_embedding_or_head
from slimplus.quantization.salience import HessianAccumulator
from slimplus.utils.errors import InputError

logger = logging.getLogger(__name__)


def quantize_embedding_and_head(job: Job) -> dict[str, dict[str, Tensor]]:
    """Return the packed tensors of the embedding and the head by the layers' names, on the first rank.

    Every rank calls this. The head is quantized by the recipe's method with the Hessian of its inputs, which all ranks
    sum up behind the quantized blocks: on SmolLM2 that leaves a quarter of the output error that rounding to nearest
    gives at 4 bits.

    Raises:
        InputError: if the Hessian of the head's inputs cannot be inverted.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    model = job.model.model
    _load_tuned(job, model, "")
    for name, bits in job.embedding_and_head_bits.items():
        calibrated = model.get_submodule(name) is job.model.head and job.settings.method != "rtn"
        hessian = _head_hessian(job) if calibrated else None
        if job.fabric.is_global_zero:
            logger.info("%s: %d bits", name, bits)
            weight = model.get_parameter(f"{name}.weight")
            try:
                quantized = quantize_embedding_or_head(weight, hessian, replace(job.settings, bits=bits))
            except ValueError as error:
                said = with_remedy(error, job.runner.precision)
                raise InputError(f"{name}: {said}; finished blocks are kept") from error
            if (warning := storage_warning({name: (weight, quantized)})) is not None:
                job.metrics.note(warning)
            packed[name] = pack(quantized)
    return packed


def _load_tuned(job: Job, module: nn.Module, prefix: str) -> None:
    """Give a module of the model what end-to-end training made of its parameters, such as the norms' gains."""
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta" and (tuned := (job.tuned or {}).get(prefix + name)) is not None:
            parameter.data.copy_(tuned)


def packed_config(job: Job) -> PretrainedConfig:
    """Return the configuration of the packed model, where a head with its own bits is not tied to the embedding.

    Otherwise the weights that were loaded decide, see `ModelSource.model`.
    """
    config = deepcopy(job.model.model.config)
    bits = job.embedding_and_head_bits
    if bits and find_embedding_and_head(job.model.model).head in bits:
        set_tied(config, False)
    return config


def _head_hessian(job: Job) -> Tensor:
    """Return the Hessian of the head's inputs `[hidden, hidden]`, over all ranks' windows, on the first rank."""
    job.run.open()  # the first rank has written blocks since the others read which files are complete

    def finished(index: int, block: nn.Module) -> nn.Module:
        tensors, _ = job.finished_block(index)
        packed = load_packed_block(block, tensors, job.settings.group_size)
        _load_tuned(job, packed, f"{job.block_names[index]}.")
        return packed

    tokens = job.shard(job.calibration.tokens)
    hidden = job.model.last_hidden(job.model.block_inputs(tokens), job.progress.track, finished)
    accumulator = HessianAccumulator(job.model.head.in_features, job.runner.device)
    job.model.capture_head_inputs(tokens, hidden, accumulator.add)
    job.ranks.sum_on(0, accumulator.total)
    accumulator.tokens *= job.ranks.count
    return accumulator.hessian
