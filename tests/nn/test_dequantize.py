"""Ordinary layers in the place of packed ones."""

from __future__ import annotations

import torch
from torch import nn

import slimplus
from tests.support.layers import Attention, inputs_of


def test_ordinary_layers_compute_what_the_packed_ones_did() -> None:
    module, inputs = Attention(), inputs_of(3, dtype=torch.float32)
    expected = [output.clone() for output in module(inputs)]
    assert slimplus.dequantize(module) is module
    assert {type(layer) for layer in module.children()} == {nn.Linear}
    assert all(torch.equal(found, output) for found, output in zip(module(inputs), expected, strict=True))


def test_the_dtype_can_be_chosen() -> None:
    module = slimplus.dequantize(Attention(), torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
