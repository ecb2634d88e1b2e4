"""Blocks that run as compiled code while they are trained.

What a block does between its products (fake-quantization, norms, activations) takes one pass over memory where the
operators take about seven each. Blocks of one kind and shape share the code: their tensors are its arguments.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from slimplus.models.block_arguments import BlockCall, call_block

logger = logging.getLogger(__name__)


@functools.cache
def compiled_call() -> BlockCall:
    """Return `call_block` as compiled code."""
    return cast(BlockCall, torch.compile(call_block, dynamic=False))


class CompiledCall:
    """Call of blocks as compiled code; a kind of block that cannot be compiled runs as it is, after one warning."""

    def __init__(self) -> None:
        self._failed: set[type[nn.Module]] = set()

    def __call__(self, block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Return what `call_block` returns for these arguments."""
        if type(block) not in self._failed:
            try:
                return compiled_call()(block, hidden, arguments)
            except TorchDynamoException as error:
                self._failed.add(type(block))
                _warn(error)
        return call_block(block, hidden, arguments)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Return whether code can be compiled for a device; a warning tells why not."""
    try:
        torch.compile(lambda tensor: tensor.sin() + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:  # of the compiler's back end, such as a missing C++ compiler
        _warn(error)
        return False
    return True


def _warn(error: Exception) -> None:
    logger.warning("training.compile: %s; the training goes on without", str(error).strip().split("\n", 1)[0])
