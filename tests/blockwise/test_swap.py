"""Blocks with packed layers."""

from __future__ import annotations

import torch
from torch import nn

from slimplus.blockwise.swap import (
    load_packed_block,
    packed_block,
    packed_tensors,
)
from slimplus.models.streaming import BlockInputs
from tests.support.blocks import GROUP_SIZE, RUNNER, quantize_first_block


def test_packed_tensors_restore_a_block(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    block, inputs = block_and_inputs
    original, result = quantize_first_block(block_and_inputs, "gptq")
    packed = packed_block(block, result.weights)
    restored = load_packed_block(block, packed_tensors(packed), GROUP_SIZE)
    arguments = inputs.arguments[0]
    ours = RUNNER.run(RUNNER.load(restored), inputs.hidden, arguments)
    assert torch.equal(ours, RUNNER.run(RUNNER.load(packed), inputs.hidden, arguments))
