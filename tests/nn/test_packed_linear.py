"""The packed layer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import initialization

from slimplus.nn import PackedLinear
from tests.support.blocks import GROUP_SIZE


def test_packed_layer_that_does_not_fit_its_columns() -> None:
    with pytest.raises(ValueError, match="does not describe 3 groups"):
        PackedLinear(96, 16, GROUP_SIZE, {2: 4})


def test_a_packed_layer_describes_its_weight() -> None:
    """Code of models asks for it (Mamba 2), and transformers must not give it random values (GPT-2)."""
    layer = PackedLinear(64, 48, 32, {2: 2}, bias=True, dtype=torch.bfloat16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == (torch.Size([48, 64]), torch.bfloat16, "cpu")
    assert deepcopy(layer).half().weight.dtype == torch.float16
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters())
    before = layer.scales.clone()
    initialization.normal_(weight)  # type: ignore[arg-type]
    assert torch.equal(layer.scales, before)
