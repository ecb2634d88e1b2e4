"""What a block is calibrated with."""

from __future__ import annotations

from torch import nn

from slimplus.blockwise.data import BlockData
from slimplus.models.streaming import BlockInputs
from tests.support.blocks import RUNNER


def test_layers_that_read_the_same_tensor_share_a_hessian(
    block_and_inputs: tuple[nn.Module, BlockInputs],
) -> None:
    block, inputs = block_and_inputs
    data = BlockData(RUNNER.load(block), inputs.hidden, inputs.arguments[0], RUNNER)
    assert data.leader["self_attn.k_proj"] == data.leader["self_attn.v_proj"] == "self_attn.q_proj"
    assert data.leader["mlp.up_proj"] == "mlp.gate_proj"
    assert len(set(data.leader.values())) == 4
