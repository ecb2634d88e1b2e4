"""The packed layer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import initialization

from slimplus.nn import PackedLinear
from tests.support.blocks import GROUP_SIZE, Emulation
from tests.support.layers import random_weight


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


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_in_float32_where_the_cpu_emulates_bfloat16(emulate: Emulation, bias: bool) -> None:
    """Forward and backward then equal those of float32, rounded once; compiled, in one graph."""
    emulate(8.0)
    layer = PackedLinear.from_quantized(random_weight(48, 64, 32, (2, 3)), torch.rand(48) if bias else None)
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    outputs = layer(inputs)
    assert torch.equal(outputs, layer(inputs.float()).to(torch.bfloat16))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(inputs), outputs)
    found, expected = (x.clone().requires_grad_() for x in (inputs, inputs.float()))
    layer(found).sum().backward()
    layer(expected).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.equal(found.grad, expected.grad.to(torch.bfloat16))
