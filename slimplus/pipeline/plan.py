"""What a run will do and how large its result will be, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from slimplus.format.affine import group_count
from slimplus.format.planes import packed_size
from slimplus.models.architectures import embedding_and_head_bits, find_blocks, quantized_linears
from slimplus.models.loading import build_on_meta
from slimplus.pipeline.model_checks import check_shapes, planned_widths
from slimplus.pipeline.prepare import model_source
from slimplus.recipe.schema import Recipe
from slimplus.utils.units import gigabytes

BYTES_16_BIT = 2
FLOAT32 = 4
LIBRARIES = 600_000_000  # PyTorch, transformers and Lightning, loaded
# A block in training: full-precision and fake-quantized weights, what autograd keeps of them, and two gradients.
BLOCK_COPIES = 5
LOGITS_COPIES = 4  # the model's, in float32, and the metric's probabilities


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        architecture: `model_type`.
        blocks: transformer blocks.
        linears: linear layers that get packed.
        groups: groups of columns in all of them, not counting rows.
        bits: average width; None where a size is given instead.
        quantized_weights: number of weights in packed layers.
        packed_linear_bytes: everything stored for them, biases apart.
        embedding_and_head_bits: name → bits of the layers outside the blocks that get packed.
        embedding_and_head_weights: number of their weights, a tied one counted once.
        embedding_and_head_bytes: everything stored for them.
        other_bytes: the rest of the model, at 16 bits.
        host_bytes: rough peak of main memory, where the device is the CPU: the model, and the larger of one block in
            training beside three sets of hidden states, and one window's logits.
        device_bytes: rough peak on the device: embedding and head, and the largest of one block in training, one
            window's logits, and the whole model in training, its activations apart.
    """

    architecture: str
    blocks: int
    linears: int
    groups: int
    bits: float | None
    quantized_weights: int
    packed_linear_bytes: int
    embedding_and_head_bits: dict[str, int]
    embedding_and_head_weights: int
    embedding_and_head_bytes: int
    other_bytes: int
    host_bytes: int
    device_bytes: int

    @property
    def full_bytes(self) -> int:
        """The model at 16 bits."""
        return (self.quantized_weights + self.embedding_and_head_weights) * BYTES_16_BIT + self.other_bytes

    @property
    def packed_bytes(self) -> int:
        """The packed checkpoint."""
        return self.packed_linear_bytes + self.embedding_and_head_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the packed layers, over their weights."""
        return 8 * self.packed_linear_bytes / self.quantized_weights

    @property
    def _outside(self) -> str:
        packed = [f"{name} {bits} bits" for name, bits in self.embedding_and_head_bits.items()]
        return ", ".join([*packed, f"{gigabytes(self.other_bytes)} at 16 bit"])

    def __str__(self) -> str:
        rows = {
            "architecture": self.architecture,
            "blocks": f"{self.blocks:,}",
            "linear layers": f"{self.linears:,}",
            "groups": f"{self.groups:,}",
            "average bits": "as many as fit the size" if self.bits is None else f"{self.bits:.3f}",
            "effective bits per weight": f"{self.bits_per_weight:.3f} (scales, zero points and indices counted)",
            "outside the blocks": self._outside,
            "size": f"{gigabytes(self.full_bytes)} at 16 bit -> {gigabytes(self.packed_bytes)} packed "
            f"({self.full_bytes / self.packed_bytes:.1f} times smaller)",
            "peak memory estimate": f"{gigabytes(self.host_bytes)} main memory; on a GPU, if there is one, "
            f"{gigabytes(self.device_bytes)}",
        }
        return "\n".join(f"{name:<26} {value}" for name, value in rows.items())


def make_plan(
    model: PreTrainedModel,
    bits: float | None,
    packed_linear_bytes: int,
    group_size: int,
    scale_bits: int,
    embedding_and_head_bits: dict[str, int],
    calibration: tuple[int, int],
    evaluation_length: int,
    whole_bytes: int,
) -> Plan:
    """Plan for `model`, which may lie on the meta device.

    Args:
        model: the full-precision model.
        bits: average width; None where a size is given instead.
        packed_linear_bytes: of all packed layers of the blocks.
        group_size: columns a group.
        scale_bits: that a scale takes.
        embedding_and_head_bits: name → bits of the layers outside the blocks that get packed.
        calibration: number of windows, and tokens in each.
        evaluation_length: tokens in an evaluation window.
        whole_bytes: that the device holds for a weight while the whole model is trained; 0 where it is not.
    """
    layers, total = quantized_linears(model), sum(parameter.numel() for parameter in model.parameters())
    size = partial(packed_size, group_size=group_size, scale_bits=scale_bits)
    quantized = sum(layer.weight.numel() for layer in layers.values())
    outer = {name: model.get_parameter(f"{name}.weight") for name in embedding_and_head_bits}
    embedding_and_head_weights = sum(
        weight.numel() for weight in {id(weight): weight for weight in outer.values()}.values()
    )
    host_bytes, device_bytes = _memory(model, quantized * whole_bytes, calibration, evaluation_length)
    return Plan(
        architecture=model.config.model_type,
        blocks=len(find_blocks(model)),
        linears=len(layers),
        groups=sum(group_count(layer.in_features, group_size) for layer in layers.values()),
        bits=bits,
        quantized_weights=quantized,
        packed_linear_bytes=packed_linear_bytes,
        embedding_and_head_bits=embedding_and_head_bits,
        embedding_and_head_weights=embedding_and_head_weights,
        embedding_and_head_bytes=sum(
            size(len(weight), {embedding_and_head_bits[name]: group_count(weight.shape[1], group_size)})
            for name, weight in outer.items()
        ),
        other_bytes=(total - quantized - embedding_and_head_weights) * BYTES_16_BIT,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
    )


def _memory(
    model: PreTrainedModel, weights: int, calibration: tuple[int, int], evaluation_length: int
) -> tuple[int, int]:
    """`host_bytes` and `device_bytes` of a plan; `weights` are the bytes of all those trained together."""
    blocks, total = find_blocks(model), sum(parameter.numel() for parameter in model.parameters())
    windows, length = calibration
    token_logits = LOGITS_COPIES * model.config.vocab_size * FLOAT32
    block = BLOCK_COPIES * FLOAT32 * max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    whole = weights + length * token_logits if weights else 0
    logits = evaluation_length * token_logits
    outside = FLOAT32 * (total - sum(parameter.numel() for parameter in blocks.parameters()))
    hidden = windows * length * model.config.hidden_size * FLOAT32
    host = LIBRARIES + total * BYTES_16_BIT + outside + max(block + 3 * hidden, logits, whole)
    return host, outside + max(block, logits, whole)


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
    outer = embedding_and_head_bits(model, settings.embedding_bits, settings.head_bits)
    grid = (*planned_widths(model, recipe), settings.group_size, settings.scale_bits)
    return str(make_plan(model, *grid, outer, calibration, length, _whole_bytes(recipe)))


def _whole_bytes(recipe: Recipe) -> int:
    """Bytes of a weight while the whole model is trained: the integer, and what the backward pass multiplies by."""
    if not recipe.end_to_end.epochs:
        return 0
    kept = 4 if recipe.trainer.precision == "32-true" else 2
    return 1 if recipe.end_to_end.activation_checkpointing else 1 + kept
