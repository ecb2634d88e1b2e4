"""Blocks that are trained as compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig, LlamaForCausalLM

from slimplus.blockwise.quantizer import QuantizerConfig
from slimplus.blockwise.swap import fake_quantized_block
from slimplus.models.block_arguments import BlockCall, call_block
from slimplus.models.streaming import BlockInputs, StreamedModel
from slimplus.nn import FakeQuantizedLinear
from slimplus.training import compiled
from slimplus.training.compiled import CompiledCall, can_compile
from slimplus.training.reconstruction import BlockReconstruction, ReconstructionConfig
from tests.support.blocks import RUNNER, quantize_first_block

BlockAndInputs = tuple[nn.Module, BlockInputs]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    yield
    torch.compiler.reset()


def _module(
    found: BlockAndInputs,
    call: BlockCall,
    per_weight: Literal["rounding", "weights"] | None,
    precision: str = "32-true",
) -> BlockReconstruction:
    original, result = quantize_first_block(found, "slimllm")
    block = fake_quantized_block(original, result, QuantizerConfig(per_weight, {2: 0.5}))
    return BlockReconstruction(block, found[1].arguments[0], ReconstructionConfig(1, 1), precision, call=call)


def _step(module: BlockReconstruction, batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    loss = module.loss(batch)
    loss.backward()
    return loss.detach(), [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize(("per_weight", "precision"), [("weights", "32-true"), ("rounding", "bf16-mixed")])
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_give_the_same_loss_and_gradients(
    block_and_inputs: BlockAndInputs, per_weight: Literal["rounding", "weights"] | None, precision: str
) -> None:
    hidden, arguments = block_and_inputs[1].hidden[:2], block_and_inputs[1].arguments[0]
    batch = hidden, RUNNER.run(RUNNER.load(block_and_inputs[0]), hidden, arguments)
    plain, fused = (_module(block_and_inputs, call, per_weight, precision) for call in (call_block, CompiledCall()))
    (loss, gradients), (fused_loss, fused_gradients) = _step(plain, batch), _step(fused, batch)
    tolerance = 1e-5 if precision == "32-true" else 2e-2  # bfloat16 rounds to 8 bits
    torch.testing.assert_close(fused_loss, loss, rtol=tolerance, atol=0)
    assert len(gradients) == len(fused_gradients) > 0
    for gradient, other in zip(gradients, fused_gradients, strict=True):
        assert (other - gradient).norm() <= tolerance * gradient.norm()
    layers = [layer for layer in fused.modules() if isinstance(layer, FakeQuantizedLinear)]
    assert layers
    assert all(torch.equal(x.fake_quantized_weight(), x.quantized_weight().dequantize()) for x in layers)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_blocks_of_a_shape_share_the_code() -> None:
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=64
    )
    model = StreamedModel(LlamaForCausalLM(config).eval().requires_grad_(False), RUNNER)
    inputs = model.block_inputs(torch.arange(48).view(2, 24))
    for index, block in enumerate(model.blocks):
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = block, BlockInputs(inputs.hidden, [inputs.arguments[index]])
            loss, gradients = _step(_module(found, CompiledCall(), "rounding"), (inputs.hidden, inputs.hidden))
        assert torch.isfinite(loss)
        assert gradients


def test_what_cannot_be_compiled_is_trained_as_it_is(
    block_and_inputs: BlockAndInputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise BackendCompilerFailed(fail, RuntimeError("no such instruction"), None)

    monkeypatch.setattr(compiled, "compiled_call", lambda: fail)
    hidden, call = block_and_inputs[1].hidden[:2], CompiledCall()
    plain, *blocks = (_module(block_and_inputs, each, "rounding") for each in (call_block, call, call))
    for fused in blocks:
        for _ in range(2):
            assert torch.equal(fused.loss((hidden, hidden)), plain.loss((hidden, hidden)))
    assert len(caplog.messages) == 1  # the second block of a kind is not tried
    assert caplog.messages[0].startswith("training.compile: ")
    assert caplog.messages[0].endswith("; the training goes on without")


def test_without_a_compiler_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nset CXX")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    can_compile.cache_clear()
    assert not can_compile(torch.device("cpu"))
    assert "training.compile: InvalidCxxCompiler: no working C++ compiler; the training goes on without" in caplog.text
    can_compile.cache_clear()
