"""The products that a visit measures, and what one row says of a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cost_model import Product, predict
from benchmarks.gpu.machine import Visit, launch_facts, spread
from benchmarks.kernels import GROUP_SIZE, MIXES, MODELS
from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import LaunchConfig, blocks, bucket
from slimplus.kernels.measure import RandomWeights, copies_beyond_cache, random_weights, relative_error
from slimplus.kernels.packed_matmul import choose_launch, count_slots

TINY = {"tiny": {"gate_up": ((128, 128), 256), "down": ((16,), 256)}}
"""The layers of a rehearsal, in the form of `MODELS`."""


@dataclass(frozen=True)
class Layer:
    """One or more weights that read the same input.

    Attributes:
        model: name of the model.
        name: name of the layer.
        out_features: rows of each weight.
        in_features: columns.
    """

    model: str
    name: str
    out_features: tuple[int, ...]
    in_features: int

    def case(self, **further: Any) -> dict[str, Any]:
        """Return the entries of a row that name the layer, and further ones."""
        return {"model": self.model, "layer": self.name, **further}

    def shape(self, widths: Sequence[int]) -> FusedShape:
        """Return the shape of a launch, with groups of these widths."""
        return FusedShape(self.in_features, GROUP_SIZE, self.out_features, tuple(sorted(set(widths))))


def layers(visit: Visit, models: Sequence[str] = tuple(MODELS)) -> list[Layer]:
    """Return the layers of some models; those of a tiny one in a rehearsal."""
    source = TINY if visit.rehearsal else {model: MODELS[model] for model in models}
    return [Layer(model, name, *shape) for model, found in source.items() for name, shape in found.items()]


def mixes(visit: Visit, names: Sequence[str] = tuple(MIXES)) -> Mapping[str, tuple[int, ...]]:
    """Return mixes of widths by name; only the first and the last in a rehearsal."""
    chosen = (names[0], names[-1]) if visit.rehearsal else names
    return {name: MIXES[name] for name in chosen}


def make_weights(visit: Visit, layer: Layer, widths: Sequence[int]) -> list[RandomWeights]:
    """Return random weights of a layer, so many that together they lie beyond the cache."""
    make = partial(random_weights, layer.out_features, layer.in_features, GROUP_SIZE, widths, visit.device)
    first = make()
    return [first, *(make() for _ in range(copies_beyond_cache(first.size, visit.device) - 1))]


def default(visit: Visit, weights: RandomWeights, tokens: int, dtype: torch.dtype) -> LaunchConfig:
    """Return the launch that a product gets."""
    scale_dtype = weights.fused["scales"].dtype
    return choose_launch(visit.device, weights.shape, dtype, scale_dtype, False, bucket(tokens))


def describe_product(
    visit: Visit, weights: Sequence[RandomWeights], inputs: Tensor, launch: LaunchConfig, ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Check a product and time it, and return the entries of its row.

    Args:
        visit: the machine.
        weights: weights of one shape, which take turns.
        inputs: `[tokens, in]`.
        launch: the launch.
        ceilings: bytes a second that the GPU reaches, by the way it reaches them.

    Raises:
        RuntimeError: if the GPU cannot run the launch.
    """
    first = weights[0]
    error = relative_error(first.multiply(inputs, launch), first.exact(inputs))
    facts = launch_facts(visit, first, inputs, launch)
    calls: list[Callable[[], Tensor]] = [partial(each.multiply, inputs, launch) for each in weights]
    seconds = spread(visit.times(calls))
    return {
        "shape": [list(first.shape.out_features), first.shape.in_features],
        "dtype": str(inputs.dtype).removeprefix("torch."),
        **facts,
        "relative_error": error,
        "bytes": first.size,
        "seconds": seconds,
        "of_ceilings": {name: first.size / seconds["median"] / rate for name, rate in ceilings.items()},
        "predicted": _prediction(visit, first, len(inputs), launch, facts["slots"]),
    }


def _prediction(
    visit: Visit, weights: RandomWeights, tokens: int, launch: LaunchConfig, slots: int
) -> dict[str, float] | None:
    """Return the predicted seconds by their causes; None above the tokens that the model was made for."""
    if tokens > launch.block_m or tokens > 8:
        return None
    found = predict(
        _product(weights.shape, weights.bit_counts, weights.size, launch, tokens),
        visit.multiprocessors,
        slots // visit.multiprocessors,
    )
    return asdict(found) | {"total": found.total}


def predict_layer(visit: Visit, layer: Layer, widths: Sequence[int]) -> float:
    """Return the predicted seconds of a layer's product for one token in bfloat16.

    Args:
        visit: the machine.
        layer: the layer.
        widths: widths of the groups, in turn.
    """
    shape = layer.shape(widths)
    chosen = [widths[group % len(widths)] for group in range(-(-shape.in_features // GROUP_SIZE))]
    counts = {width: chosen.count(width) for width in shape.widths}
    size = sum(
        torch.Size(dimensions).numel() * dtype.itemsize
        for rows in shape.out_features
        for dimensions, dtype in packed_shapes(rows, counts, GROUP_SIZE).values()
    )
    arguments = (visit.device, shape, torch.bfloat16, torch.float16, False)
    launch = choose_launch(*arguments, bucket(1))
    resident = max(1, count_slots(*arguments, launch) // visit.multiprocessors)
    product = _product(shape, counts, size, launch, 1)
    return predict(product, visit.multiprocessors, resident).total


def _product(shape: FusedShape, counts: BitCounts, size: int, launch: LaunchConfig, tokens: int) -> Product:
    """Return what a prediction asks of a product."""
    weights = sum(shape.out_features) * shape.in_features
    return Product(weights, size, counts, blocks(launch, shape.out_features, tokens), launch.split_k)
