"""Layers whose weight is quantized: fake-quantized for training, packed for inference."""

from slimplus.nn.fake_quantized import FakeQuantizedLinear, LearnedRoundingLinear, TrainedWeightLinear
from slimplus.nn.packed import PackedLinear
from slimplus.nn.packed_embedding import PackedEmbedding, TiedHead
from slimplus.nn.projections import prepare_inference

__all__ = [
    "FakeQuantizedLinear",
    "LearnedRoundingLinear",
    "PackedEmbedding",
    "PackedLinear",
    "TiedHead",
    "TrainedWeightLinear",
    "prepare_inference",
]
