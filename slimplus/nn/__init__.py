"""Linear layers whose weight is quantized: fake-quantized for training, packed for inference."""

from slimplus.nn.fake_quantized import FakeQuantizedLinear
from slimplus.nn.packed import PackedLinear

__all__ = ["FakeQuantizedLinear", "PackedLinear"]
