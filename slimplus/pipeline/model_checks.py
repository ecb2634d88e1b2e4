"""Checks of a recipe against the shapes of its model, before any long work."""

from __future__ import annotations

from collections import Counter
from functools import partial

from transformers import PreTrainedModel

from slimplus.format.affine import group_count
from slimplus.format.planes import packed_size
from slimplus.models.architectures import (
    blocks_path,
    find_blocks,
    find_linears,
    following_norm,
    left_out,
    packed_share,
    quantized_linears,
    stack_of_layers,
    too_long,
)
from slimplus.quantization.knapsack import check_budget, costs_and_budget
from slimplus.quantization.stack_allocation import pool_costs
from slimplus.recipe.schema import QuantizationSection, Recipe
from slimplus.run_dir.allocation_file import average_bits, check_allocation, read_allocation
from slimplus.utils.errors import InputError

LEAST_PACKED = 0.9
"""Share of the weights in the blocks below which a run is refused: the checkpoint would hardly be smaller."""


def check_shapes(model: PreTrainedModel, recipe: Recipe) -> None:
    """Check that a model has the shapes that a recipe needs.

    Args:
        model: the model; it may lie on the meta device.
        recipe: the resolved recipe.

    Raises:
        InputError: if a window is longer than the model's context, too few weights can be packed, no norm follows a
            block whose loss needs one, or no widths meet the average or the size (see `check_widths`).
    """
    lengths = {key: text.sequence_length for key, text in recipe.evaluation_texts.items()}
    for key, length in {"data": recipe.data.sequence_length, **lengths}.items():
        if problem := too_long(model.config, f"{key}.sequence_length", length):
            raise InputError(problem)
    check_packed_share(model, recipe.model.allow_unpacked)
    if recipe.quantization.trains and recipe.training.loss.error == "after_norm":
        for index in range(len(find_blocks(model))):
            following_norm(model, index)
    check_widths(model, recipe.quantization)


def check_packed_share(model: PreTrainedModel, allow_unpacked: bool) -> None:
    """Check that most of the weights in the blocks get packed.

    Raises:
        InputError: if it is less than `LEAST_PACKED`, unless `allow_unpacked`.
    """
    share = packed_share(model)
    if share >= LEAST_PACKED or allow_unpacked:
        return
    reasons = Counter(reason for block in find_blocks(model) for reason in left_out(block).values())
    experts = any("experts" in reason for reason in reasons)
    why = "experts of its layout stay at 16 bit" if experts else "`slimplus check` names the others"
    raise InputError(
        f"model.path: only {share:.1%} of the weights in the blocks of this {model.config.model_type} model can be "
        f"packed: {why}; set model.allow_unpacked=true to quantize these alone"
    )


def given_allocation(model: PreTrainedModel, recipe: Recipe) -> dict[str, list[int]] | None:
    """Return the widths that the recipe imports, by layer in the order of groups, or None if it imports none.

    Raises:
        InputError: if the file is no allocation, or belongs to another model or group size.
    """
    settings = recipe.quantization
    if settings.allocation is None or settings.allocates_by != "file":
        return None
    allocation = read_allocation(settings.allocation, settings.group_size, blocks_path(model))
    layers = quantized_linears(model)
    check_allocation(
        allocation, {name: group_count(layer.in_features, settings.group_size) for name, layer in layers.items()}
    )
    return allocation


def planned_widths(model: PreTrainedModel, recipe: Recipe) -> tuple[float | None, int]:
    """Return the average width and the packed size of the blocks' linear layers, from their shapes.

    Returns:
        The average width, or None if the recipe gives a size instead; and the size in bytes.

    Raises:
        InputError: if the recipe imports an allocation that does not fit (see `given_allocation`).
    """
    settings, layers = recipe.quantization, quantized_linears(model)
    size = partial(packed_size, group_size=settings.group_size, scale_bits=settings.scale_bits)

    def uniform(bits: int) -> int:
        groups = partial(group_count, group_size=settings.group_size)
        return sum(size(layer.out_features, {bits: groups(layer.in_features)}) for layer in layers.values())

    if (given := given_allocation(model, recipe)) is not None:
        stored = (size(layer.out_features, Counter(given[name])) for name, layer in layers.items())
        return average_bits(given, layers, settings.group_size), sum(stored)
    if settings.size_bytes is not None:
        return None, min(settings.size_bytes, uniform(max(settings.widths)))
    # One group a bit narrower and one a bit wider take as many bytes as two groups of the average width.
    return settings.bits, uniform(settings.bits)


def check_widths(model: PreTrainedModel, settings: QuantizationSection) -> None:
    """Check that the widths of an allocation by sensitivity can meet the average or the size that the recipe asks for.

    Raises:
        InputError: if they cannot.
    """
    if settings.allocates_by not in ("block", "model"):
        return
    size, widths = settings.size_bytes, settings.widths
    parts = find_blocks(model) if settings.allocates_by == "block" else (model,)
    for part in parts:
        layers = quantized_linears(model) if part is model else find_linears(part)
        stack = stack_of_layers(part)
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        costs, budget = costs_and_budget(shapes, settings.bits, settings.group_size, widths, size, settings.scale_bits)
        pooled = pool_costs(costs, stack)
        try:
            check_budget(pooled.values(), widths, budget, exact=size is None and not settings.per_layer)
        except ValueError as error:
            if size is not None:
                raise InputError(
                    f"quantization.size_bytes: {error} bytes; give more, larger groups (quantization.group_size) or "
                    "quantization.scale_bits=8"
                ) from error
            dense = list(range(widths[0], widths[-1] + 1))
            raise InputError(
                f"quantization.widths: {error} bits; leave no gaps, as in quantization.widths={dense}"
            ) from error
