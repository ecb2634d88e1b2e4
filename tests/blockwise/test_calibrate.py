"""The calibration of a block."""

from __future__ import annotations

import torch
from torch import nn

from slimplus.blockwise.swap import (
    packed_block,
)
from slimplus.models.architectures import find_linears
from slimplus.models.streaming import BlockInputs
from tests.support.blocks import RUNNER, block_error, quantize_first_block


def test_each_method_is_better_than_the_one_before(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    errors = {}
    for method in ("rtn", "gptq", "slimllm"):
        original, result = quantize_first_block(block_and_inputs, method)
        packed = packed_block(block_and_inputs[0], result.weights)
        errors[method] = block_error(packed, original, block_and_inputs[1])
    assert errors["slimllm"] < errors["gptq"] < errors["rtn"]


def test_given_bits_are_used(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    layers = find_linears(block_and_inputs[0])
    bits = {name: torch.full((-(-layer.in_features // 32),), 3) for name, layer in layers.items()}
    _, result = quantize_first_block(block_and_inputs, "slimllm", bits)
    assert all(torch.equal(result.weights[name].bits, bits[name]) for name in layers)


def test_calibration_leaves_the_block_alone(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    original, _ = quantize_first_block(block_and_inputs, "slimllm")
    untouched = RUNNER.load(block_and_inputs[0])
    for mine, theirs in zip(original.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(module._forward_pre_hooks for module in original.modules())
