"""What a recipe asks, checked against the model's shapes before any long work."""

from __future__ import annotations

from functools import partial
from itertools import chain

from transformers import PreTrainedModel

from slimplus.config import QuantizationConfig, Recipe
from slimplus.errors import InputError
from slimplus.models.architectures import find_blocks, find_linears
from slimplus.quantization.budget import bit_costs, byte_costs, check_budget


def check_shapes(model: PreTrainedModel, recipe: Recipe) -> None:
    """Check what the recipe asks against the shapes of `model`, which may lie on the meta device.

    Raises:
        InputError: for windows longer than its context, and where `check_widths` does.
    """
    longest, data = getattr(model.config, "max_position_embeddings", None), recipe.data
    for key, length in (("", data.sequence_length), ("evaluation.", data.evaluation.sequence_length)):
        if longest is not None and length > longest:
            raise InputError(
                f"data.{key}sequence_length: {length} tokens are more than the model takes; give at most {longest}"
            )
    check_widths(model, recipe.quantization)


def check_widths(model: PreTrainedModel, settings: QuantizationConfig) -> None:
    """Check that widths by sensitivity can meet the average, or the size, that is asked of the blocks of `model`.

    Raises:
        InputError: if not.
    """
    if settings.allocates_by not in ("block", "model"):
        return
    size, widths, group_size = settings.size_bytes, settings.widths, settings.group_size
    blocks = [list(find_linears(block).values()) for block in find_blocks(model)]
    scopes = blocks if settings.allocates_by == "block" else [list(chain.from_iterable(blocks))]
    price = bit_costs if size is None else partial(byte_costs, scale_bits=settings.scale_bits)
    for layers in scopes:
        costs = [price(layer.out_features, layer.in_features, group_size, widths) for layer in layers]
        weights = sum(layer.weight.numel() for layer in layers)
        try:
            check_budget(costs, widths, settings.bits * weights if size is None else size, exact=size is None)
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
