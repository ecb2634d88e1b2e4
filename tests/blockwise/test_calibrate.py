"""The calibration of a block."""

from __future__ import annotations

import torch
from torch import nn

from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.swap import packed_block
from slimplus.models.architectures import find_linears
from slimplus.models.streaming import BlockInputs
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.losses import normalized_error
from tests.support.blocks import GROUP_SIZE, RUNNER, block_error, quantize_first_block


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


def test_layers_make_up_for_the_error_of_their_inputs(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    """The error of the block's output against the full-precision block's on the inputs that it should have."""
    block, inputs = block_and_inputs
    original, arguments = RUNNER.load(block), inputs.arguments[0]
    torch.manual_seed(0)
    hidden = inputs.hidden + 0.3 * inputs.hidden.std() * torch.randn_like(inputs.hidden)
    data = BlockData(original, hidden, arguments, RUNNER, full_hidden=inputs.hidden)
    target = RUNNER.run(original, inputs.hidden, arguments)
    errors = []
    for strength in (0.0, 0.5, 1.0):
        config = QuantizationConfig("gptq", 4, GROUP_SIZE, error_propagation=strength)
        result = quantize_block(data, config)
        assert list(result.weights) == list(find_linears(block))
        packed = RUNNER.load(packed_block(block, result.weights))
        errors.append(float(normalized_error(RUNNER.run(packed, hidden, arguments), target)))
    assert errors[2] < errors[1] < errors[0]
    untouched = RUNNER.load(block)
    assert all(torch.equal(mine, own) for mine, own in zip(original.parameters(), untouched.parameters(), strict=True))
