"""The plan that a dry run prints: sizes and peak memory, from the shapes of the model alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from slimplus.format.affine import group_count
from slimplus.format.planes import packed_size
from slimplus.models.architectures import embedding_and_head_bits, find_blocks, is_tied, packed_share, quantized_linears
from slimplus.models.loading import build_on_meta
from slimplus.pipeline.memory import FLOAT32, Needs, memory_needs, memory_rows
from slimplus.pipeline.model_checks import check_shapes, planned_widths
from slimplus.pipeline.prepare import model_source
from slimplus.pipeline.self_check import self_check
from slimplus.recipe.schema import Recipe
from slimplus.utils.units import format_bytes

BYTES_16_BIT = 2
CHECKPOINT_COPIES = 3  # of a block in training: what is trained, and an optimizer's two moments


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and of the checkpoint that it writes.

    Attributes:
        architecture: transformers' `model_type`.
        blocks: number of transformer blocks.
        linears: number of linear layers in the blocks that get packed.
        packed_share: share of the weights in the blocks that gets packed.
        groups: number of groups of columns in these linear layers.
        bits: average width of their weights; None where the recipe gives a size instead.
        quantized_weights: number of their weights.
        packed_linear_bytes: bytes of their packed tensors, without biases.
        embedding_and_head_bits: name → bits of the packed layers outside the blocks.
        embedding_and_head_weights: number of weights in the packed layers outside the blocks, tied ones counted once.
        embedding_and_head_bytes: bytes of the packed tensors outside the blocks.
        other_bytes: bytes of everything that is not packed, at 16 bit.
        needs: rough peaks of memory.
        recipe: the recipe of the run.
    """

    architecture: str
    blocks: int
    linears: int
    packed_share: float
    groups: int
    bits: float | None
    quantized_weights: int
    packed_linear_bytes: int
    embedding_and_head_bits: dict[str, int]
    embedding_and_head_weights: int
    embedding_and_head_bytes: int
    other_bytes: int
    needs: Needs
    recipe: Recipe

    @property
    def full_bytes(self) -> int:
        """Bytes of the model at 16 bit."""
        return (self.quantized_weights + self.embedding_and_head_weights) * BYTES_16_BIT + self.other_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed checkpoint."""
        return self.packed_linear_bytes + self.embedding_and_head_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the blocks' linear layers, scales, zero points and indices included."""
        return 8 * self.packed_linear_bytes / self.quantized_weights

    @property
    def _outside(self) -> str:
        """Sentence on what lies outside the blocks."""
        packed = [f"{name} {bits} bits" for name, bits in self.embedding_and_head_bits.items()]
        return ", ".join([*packed, f"{format_bytes(self.other_bytes)} at 16 bit"])

    def __str__(self) -> str:
        rows = {
            "architecture": self.architecture,
            "blocks": f"{self.blocks:,}",
            "linear layers": f"{self.linears:,}",
            "groups": f"{self.groups:,}",
            "average bits": ("as many as fit the size" if self.bits is None else f"{self.bits:.3f}")
            + f", of the {self.packed_share:.1%} of the weights in the blocks that are packed",
            "effective bits per weight": f"{self.bits_per_weight:.3f} (scales, zero points and indices counted)",
            "outside the blocks": self._outside,
            "size": f"{format_bytes(self.full_bytes)} at 16 bit -> {format_bytes(self.packed_bytes)} packed "
            f"({self.full_bytes / self.packed_bytes:.1f} times smaller)",
        } | memory_rows(self.needs, self.recipe)
        return "\n".join(f"{name:<26} {value}" for name, value in rows.items())


def make_plan(
    model: PreTrainedModel,
    bits: float | None,
    packed_linear_bytes: int,
    group_size: int,
    scale_bits: int,
    embedding_and_head_bits: dict[str, int],
    needs: Needs,
    recipe: Recipe,
) -> Plan:
    """Return the plan of a run on a model.

    Args:
        model: the full-precision model; it may lie on the meta device.
        bits: average width; None where the recipe gives a size instead.
        packed_linear_bytes: bytes of the packed linear layers of the blocks.
        group_size: number of columns in a group.
        scale_bits: bits of a scale.
        embedding_and_head_bits: name → bits of the layers outside the blocks that get packed.
        needs: rough peaks of memory.
        recipe: the recipe of the run.
    """
    layers, total = quantized_linears(model), sum(parameter.numel() for parameter in model.parameters())
    size = partial(packed_size, group_size=group_size, scale_bits=scale_bits)
    quantized = sum(layer.weight.numel() for layer in layers.values())
    outside = {name: model.get_parameter(f"{name}.weight") for name in embedding_and_head_bits}
    outside_weights = sum(weight.numel() for weight in {id(weight): weight for weight in outside.values()}.values())
    return Plan(
        architecture=model.config.model_type,
        blocks=len(find_blocks(model)),
        linears=len(layers),
        packed_share=packed_share(model),
        groups=sum(group_count(layer.in_features, group_size) for layer in layers.values()),
        bits=bits,
        quantized_weights=quantized,
        packed_linear_bytes=packed_linear_bytes,
        embedding_and_head_bits=embedding_and_head_bits,
        embedding_and_head_weights=outside_weights,
        embedding_and_head_bytes=sum(
            size(len(weight), {embedding_and_head_bits[name]: group_count(weight.shape[1], group_size)})
            for name, weight in outside.items()
        ),
        other_bytes=(total - quantized - outside_weights) * BYTES_16_BIT,
        needs=needs,
        recipe=recipe,
    )


def dry_run(recipe: Recipe) -> str:
    """Return the plan of a run as text; only the model's configuration is read, no weights.

    Raises:
        InputError: if the configuration cannot be read, or the model's shapes do not allow what the recipe asks for.
    """
    source, settings = model_source(recipe), recipe.quantization
    config = source.config_of(recipe.model.config) if recipe.model.config else source.config()
    model = build_on_meta(config)
    check_shapes(model, recipe)
    self_check(config)
    outside = embedding_and_head_bits(model, is_tied(model), settings.embedding_bits, settings.head_bits)
    grid = (*planned_widths(model, recipe), settings.group_size, settings.scale_bits)
    needs = memory_needs(model, recipe, recipe.trainer.precision)
    plan = make_plan(model, *grid, outside, needs, recipe)
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model))
    return f"{plan}\n{'disk':<26} {_disk(plan, recipe, largest)}"


def _disk(plan: Plan, recipe: Recipe, largest: int) -> str:
    """Return what a run writes to `run_dir`, in words.

    Args:
        plan: the plan of the run.
        recipe: the resolved recipe.
        largest: number of weights in the largest block.
    """
    copies = 2 if recipe.end_to_end.epochs else 1  # of the packed blocks: after each, and after the end-to-end training
    checkpoint = CHECKPOINT_COPIES * FLOAT32 * largest if recipe.quantization.trains else 0
    written = plan.packed_bytes + copies * plan.packed_linear_bytes + checkpoint
    return f"{format_bytes(written)} in run_dir, besides the {format_bytes(plan.full_bytes)} of the model itself"
