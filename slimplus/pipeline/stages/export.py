"""The stage that writes the packed checkpoint from the finished blocks and what is not quantized."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from slimplus.blockwise.swap import layer_tensors
from slimplus.format.affine import weight_bits
from slimplus.format.planes import count_bits
from slimplus.hub.checkpoint import write_checkpoint
from slimplus.hub.transformers_quantizer import SlimplusConfig
from slimplus.models.architectures import find_linears, packed_share
from slimplus.models.auto_class import auto_class
from slimplus.models.towers import carried_over
from slimplus.pipeline.job import Job
from slimplus.pipeline.model_card import model_card
from slimplus.pipeline.stages.embedding_and_head import packed_config, quantize_embedding_and_head
from slimplus.pipeline.stages.end_to_end import training_hash
from slimplus.run_dir.allocation_file import write_allocation
from slimplus.utils.files import staging_folder

logger = logging.getLogger(__name__)

UNREPORTED = ("divergence", "made_from", "chain")  # keys of a block's record left out of metrics.json: long or internal

PackedLayers = Mapping[str, Mapping[str, Tensor]]
"""Layer → its packed tensors by their names in the layer."""


@dataclass
class PackingSummary:
    """Widths and sizes of the packed layers, summed layer by layer.

    Attributes:
        bits: layer → width of each group, in column order.
        shapes: layer → rows and columns.
        weights: number of weights in the blocks' linear layers, without padding.
        weight_bits: sum of the widths of these weights.
        packed_bytes: bytes of the packed tensors of these weights, without biases.
        embedding_and_head_bits: name → bits of the packed layers outside the blocks, which are in no sum above.
        embedding_and_head_counts: name → number of groups of each width in the packed layers outside the blocks.
        embedding_and_head_bytes: bytes of the packed tensors outside the blocks.
        packed_share: share of the weights in the blocks that is packed.
        records: losses, damping and seconds of each block.
    """

    bits: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    weights: int = 0
    weight_bits: int = 0
    packed_bytes: int = 0
    embedding_and_head_bits: dict[str, int] = field(default_factory=dict)
    embedding_and_head_counts: dict[str, dict[int, int]] = field(default_factory=dict)
    embedding_and_head_bytes: int = 0
    packed_share: float = 1.0
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, packed: Mapping[str, Tensor], shape: torch.Size, group_size: int) -> None:
        """Count one linear layer of a block, whose weight has `shape` `[out, in]`."""
        widths = packed["group_bits"][torch.argsort(packed["group_index"])].int()
        self.bits[name] = widths.tolist()
        self.shapes[name] = list(shape)
        self.weights += shape.numel()
        self.weight_bits += weight_bits(widths, group_size, *shape)
        self.packed_bytes += sum(tensor.nbytes for key, tensor in packed.items() if key != "bias")

    def add_embedding_or_head(self, name: str, packed: Mapping[str, Tensor], shape: torch.Size) -> None:
        """Count the embedding or the head, whose weight has `shape` `[vocabulary, hidden]`."""
        self.shapes[name] = list(shape)
        counts = count_bits(packed["group_bits"])
        self.embedding_and_head_counts[name] = counts
        self.embedding_and_head_bits[name] = max(counts)
        self.embedding_and_head_bytes += sum(tensor.nbytes for tensor in packed.values())

    @property
    def bit_counts(self) -> dict[str, dict[int, int]]:
        """Layer → number of groups of each width."""
        counts = {name: count_bits(torch.tensor(widths)) for name, widths in self.bits.items()}
        return counts | self.embedding_and_head_counts

    @property
    def average_bits(self) -> float:
        """Average width of a weight in the blocks."""
        return self.weight_bits / self.weights

    @property
    def expert_coverage(self) -> dict[str, Any] | None:
        """Calibration tokens that the experts have seen, and those that saw none; None for a model without experts."""
        counts = {
            f"block {index}, {name}": own
            for index, record in enumerate(self.records)
            for name, own in record.get("experts", {}).items()
        }
        if not counts:
            return None
        every = [count for own in counts.values() for count in own]
        dead = {name: [expert for expert, count in enumerate(own) if not count] for name, own in counts.items()}
        return {
            "tokens_least": min(every),
            "tokens_median": median(every),
            "dead": {name: experts for name, experts in dead.items() if experts},
        }

    def figures(self, size_bytes: int, full_bytes: int) -> dict[str, Any]:
        """Return the entries of metrics.json on a checkpoint of `size_bytes`, of a model of `full_bytes` at 16 bit."""
        return {
            "average_bits": self.average_bits,
            "packed_share": self.packed_share,
            "bits_per_weight": 8 * self.packed_bytes / self.weights,
            "outer_bits": self.embedding_and_head_bits,
            "outer_bytes": self.embedding_and_head_bytes,
            "size_bytes": size_bytes,
            "full_size_bytes": full_bytes,
            "compression": full_bytes / size_bytes,
            **({"experts": coverage} if (coverage := self.expert_coverage) else {}),
            "blocks": self.records,
        }


def export(job: Job) -> None:
    """Write the packed checkpoint, unless the run directory holds one made from the same blocks.

    Raises:
        InputError: if the Hessian of the head's inputs cannot be inverted.
    """
    sources = [_exported_hash(job), job.embedding_and_head_bits]
    if job.metrics.get("exported_from") != sources:
        job.forget_checkpoint()
    if job.run.has_checkpoint and "size_bytes" in job.metrics:
        logger.info("checkpoint: found in %s, skipped", job.run.packed)
        return
    with job.metrics.stage("export"):
        embedding_and_head = quantize_embedding_and_head(job)
        if job.fabric.is_global_zero:
            summary = _summarize(job, embedding_and_head)
            _note_average(job, summary.average_bits)
            size = _write(job, embedding_and_head, summary)
            job.metrics |= summary.figures(size, job.model.full_bytes) | {"exported_from": sources}
        job.fabric.barrier()


def _note_average(job: Job, average: float) -> None:
    """Note where one width for each layer misses the average that the recipe asks for."""
    settings = job.recipe.quantization
    if settings.per_layer and settings.size_bytes is None and average != settings.bits:
        job.metrics.note(
            f"quantization.per_layer: widths of whole layers average {average:.4f} bits, not {settings.bits}"
        )


def _exported_hash(job: Job) -> str:
    """Return the hash of what is exported: the blocks, and what the end-to-end stage made of them."""
    if job.tuned is not None:
        return training_hash(job)
    job.run.open()  # the first rank has written blocks since the others read which files are complete
    return job.run.last_lineage(len(job.block_names))


def _summarize(job: Job, embedding_and_head: PackedLayers) -> PackingSummary:
    """Return the widths and sizes of all packed layers; one block is read at a time."""
    summary = PackingSummary(packed_share=packed_share(job.model.model))
    for index, (block_name, block) in enumerate(zip(job.block_names, job.model.blocks, strict=True)):
        tensors, record = job.finished_block(index)
        summary.records.append({key: value for key, value in record.items() if key not in UNREPORTED})
        for name, linear in find_linears(block).items():
            packed = layer_tensors(tensors, name)
            summary.add(f"{block_name}.{name}", packed, linear.weight.shape, job.settings.group_size)
    for name, layer in embedding_and_head.items():
        summary.add_embedding_or_head(name, layer, job.model.model.get_parameter(f"{name}.weight").shape)
    return summary


def _write(job: Job, embedding_and_head: PackedLayers, summary: PackingSummary) -> int:
    """Write allocation.json and the checkpoint, and return the checkpoint's size in bytes."""
    settings = job.settings
    write_allocation(job.run, summary.bits, summary.embedding_and_head_bits, settings.bits, settings.group_size)
    size = write_checkpoint(
        staging_folder(job.run.packed),
        _checkpoint_tensors(job, embedding_and_head),
        packed_config(job),
        SlimplusConfig(
            settings.bits,
            settings.group_size,
            summary.bit_counts,
            settings.method,
            summary.shapes,
            job.model.full_bytes,
            settings.scale_bits,
        ),
        job.tokenizer,
        job.model.model.generation_config,
        model_card(
            job.recipe,
            auto_class(job.model.model.config.to_dict()).__name__,
            summary.average_bits,
            summary.packed_share,
            {},
        ),
        job.source.processor_files() if carried_over(job.model.model) else (),
    )
    job.run.manifest.replace_folder(job.run.packed)
    return size


def _checkpoint_tensors(job: Job, embedding_and_head: PackedLayers) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the packed model with its name, block by block."""
    tuned = job.tuned or {}
    for name, tensor in job.model.outer_tensors():
        if name.removesuffix(".weight") not in embedding_and_head:
            yield name, tuned.get(name, tensor)
    for name, tensors in embedding_and_head.items():
        for key, tensor in tensors.items():
            yield f"{name}.{key}", tensor
    for index, block in job.model.stream():
        name = job.block_names[index]
        packed, _ = job.finished_block(index)
        linears = find_linears(block)
        for key, tensor in block.state_dict().items():
            if key.rpartition(".")[0] not in linears:
                yield f"{name}.{key}", tuned.get(f"{name}.{key}", tensor)
        for key, tensor in packed.items():
            yield f"{name}.{key}", tensor
