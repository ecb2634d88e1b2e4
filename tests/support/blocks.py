"""A block of a tiny model, calibrated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimplus.blockwise.calibrate import BlockResult, quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.models.streaming import BlockInputs, BlockRunner
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.losses import normalized_error

CPU = torch.device("cpu")
RUNNER = BlockRunner(CPU, "32-true")
GROUP_SIZE = 32

Emulation = Callable[[float], None]
"""Lets a product in 16 bits take so many times the seconds of one in float32 on the CPU."""


def quantize_first_block(
    block_and_inputs: tuple[nn.Module, BlockInputs], method: str, bits: dict[str, Tensor] | None = None
) -> tuple[nn.Module, BlockResult]:
    block, inputs = block_and_inputs
    search = "slimllm" if method == "slimllm" else "uniform"
    config = QuantizationConfig(method, 2, GROUP_SIZE, allocation=search)  # type: ignore[arg-type]
    original = RUNNER.load(block)
    data = BlockData(original, inputs.hidden, inputs.arguments[0], RUNNER)
    return original, quantize_block(data, config, bits)


def block_error(block: nn.Module, original: nn.Module, inputs: BlockInputs) -> float:
    output = RUNNER.run(RUNNER.load(block), inputs.hidden, inputs.arguments[0])
    return float(normalized_error(output, RUNNER.run(original, inputs.hidden, inputs.arguments[0])))
