"""Layers whose weight is quantized: fake-quantized for training, packed for inference."""

from slimplus.nn.fake_quantized import (
    FakeQuantizedLinear,
    LearnedRoundingLinear,
    ScaledLinear,
    ScaledRoundingLinear,
    TrainedWeightLinear,
)
from slimplus.nn.fusion import prepare_inference
from slimplus.nn.packed_embedding import PackedEmbedding, TiedHead
from slimplus.nn.packed_grid import PackedGridLinear, PackedScaledLinear
from slimplus.nn.packed_linear import PackedLinear

__all__ = [
    "FakeQuantizedLinear",
    "LearnedRoundingLinear",
    "PackedEmbedding",
    "PackedGridLinear",
    "PackedLinear",
    "PackedScaledLinear",
    "ScaledLinear",
    "ScaledRoundingLinear",
    "TiedHead",
    "TrainedWeightLinear",
    "prepare_inference",
]
