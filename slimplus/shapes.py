"""What a recipe asks, checked against the model's shapes before any long work."""

from __future__ import annotations

from transformers import PreTrainedModel

from slimplus.config import QuantizationConfig, Recipe
from slimplus.errors import InputError
from slimplus.models.architectures import find_blocks, find_linears, quantized_linears
from slimplus.quantization.budget import check_budget, costs_and_budget


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
    size, widths = settings.size_bytes, settings.widths
    by_block = settings.allocates_by == "block"
    for layers in map(find_linears, find_blocks(model)) if by_block else (quantized_linears(model),):
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        costs, budget = costs_and_budget(shapes, settings.bits, settings.group_size, widths, size, settings.scale_bits)
        try:
            check_budget(costs.values(), widths, budget, exact=size is None)
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
