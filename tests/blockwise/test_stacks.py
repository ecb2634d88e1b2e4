"""The experts of a block: Hessians in chunks, rare experts, equal numbers of widths."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from slimplus.blockwise import data as data_module
from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.sensitivity import allocate_block
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockInputs, StreamedModel
from slimplus.quantization.linear import QuantizationConfig
from tests.support.blocks import GROUP_SIZE, RUNNER
from tests.support.models import ModelMaker

EXPERTS, DEAD = 5, 2


@pytest.fixture(scope="module")
def mixture(make_model: ModelMaker) -> tuple[nn.Module, BlockInputs]:
    """A block of experts of which one gets no token, and its inputs."""
    streamed = StreamedModel(ModelSource(str(make_model("mixtral"))).model(), RUNNER)
    gate = streamed.blocks[0].get_parameter("mlp.gate.weight").data
    gate[1], gate[DEAD], gate[4] = -gate[0], 0, -gate[3]  # two of the other four are always positive
    tokens = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    return streamed.blocks[0], streamed.block_inputs(tokens)


def block_data(mixture: tuple[nn.Module, BlockInputs]) -> BlockData:
    block, inputs = mixture
    return BlockData(RUNNER.load(block), inputs.hidden, inputs.arguments[0], RUNNER)


def widths_by_stack(bits: dict[str, Tensor], data: BlockData) -> dict[str, set[tuple[tuple[int, int], ...]]]:
    """The numbers of groups of each width that occur in a stack."""
    found: dict[str, set[tuple[tuple[int, int], ...]]] = {}
    for name, stack in data.stack.items():
        found.setdefault(stack, set()).add(tuple(sorted(Counter(bits[name].tolist()).items())))
    return found


@pytest.mark.parametrize("allocation", ["slimllm", "block"])
def test_experts_in_chunks_are_quantized_as_together(
    mixture: tuple[nn.Module, BlockInputs], monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    config = QuantizationConfig("slimllm", 2, GROUP_SIZE, allocation=allocation)  # type: ignore[arg-type]
    results = []
    for limit in (data_module.HESSIAN_BYTES, 3 * 64 * 64 * 8):
        monkeypatch.setattr(data_module, "HESSIAN_BYTES", limit)
        data = block_data(mixture)
        bits = allocate_block(data, config) if allocation == "block" else None
        results.append((len(data.chunks), quantize_block(data, config, bits)))
    (whole, expected), (parts, found) = results
    assert (whole, parts > 2) == (1, True)
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name].bits, weight.bits), name
        assert torch.equal(found.weights[name].integers, weight.integers), name
    counts = widths_by_stack({name: weight.bits for name, weight in expected.weights.items()}, block_data(mixture))
    assert set(counts) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(len(own) == 1 for own in counts.values())


def test_an_expert_without_tokens_is_quantized_by_the_inputs_of_the_others(
    mixture: tuple[nn.Module, BlockInputs],
) -> None:
    data = block_data(mixture)
    result = quantize_block(data, QuantizationConfig("slimllm", 2, GROUP_SIZE))
    tokens = [result.tokens[f"mlp.experts.gate_up_proj.{expert}"] for expert in range(EXPERTS)]
    assert tokens[DEAD] == 0
    assert sum(tokens) == 2 * 4 * 32
    dead = f"mlp.experts.gate_up_proj.{DEAD}"
    assert result.weights[dead].scale.isfinite().all()
    assert result.dead_columns[dead] == 0
    seen: list[Tensor] = []
    data.capture_inputs({"mlp.experts.gate_up_proj.0": seen.append, "mlp.experts.gate_up_proj.1": seen.append})
    inputs, weight = torch.cat(seen), data.layers[dead].weight
    rounded = quantize_block(data, QuantizationConfig("rtn", 2, GROUP_SIZE)).weights[dead]
    errors = [
        float((inputs @ (own.dequantize() - weight).T).square().mean()) for own in (result.weights[dead], rounded)
    ]
    assert errors[0] < errors[1]
