"""Running a model block by block."""

from __future__ import annotations

import pytest
import torch

from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel, windows_at_a_time
from tests.support.blocks import CPU, RUNNER
from tests.support.models import TINY, ModelMaker


@pytest.mark.parametrize("windows", [1, 2])  # of three: as on a CPU, and as on a GPU
@pytest.mark.parametrize("model_type", TINY)
def test_streaming_gives_the_logits_of_the_model(
    make_model: ModelMaker, tokens: torch.Tensor, model_type: str, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimplus.models.streaming.windows_at_a_time", lambda device, sequence_length: windows)
    source = ModelSource(str(make_model(model_type)), dtype="float32")
    with torch.no_grad():
        expected = source.model()(input_ids=tokens).logits
    streamed = StreamedModel(source.model(), RUNNER)
    inputs = streamed.block_inputs(tokens)
    hidden = inputs.hidden
    for block, arguments in zip(streamed.blocks, inputs.arguments, strict=True):
        hidden = RUNNER.run(RUNNER.load(block), hidden, arguments)
    torch.testing.assert_close(streamed.logits(tokens, hidden), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_without_windows_runs_nothing(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    """Of a few long windows not every rank has a share."""
    streamed = StreamedModel(ModelSource(str(make_model("llama")), dtype="float32").model(), RUNNER)
    inputs = streamed.block_inputs(tokens[:0])
    outputs = RUNNER.run(RUNNER.load(streamed.blocks[0]), inputs.hidden, inputs.arguments[0])
    assert outputs.shape == (0, 24, 64)


def test_a_gpu_runs_as_many_windows_as_keep_it_busy() -> None:
    counts = [windows_at_a_time(torch.device("cuda"), length) for length in (256, 2048, 16384)]
    assert counts == [32, 4, 1]
    assert windows_at_a_time(CPU, 256) == 1


def test_the_model_is_whole_again_after_streaming(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    model = ModelSource(str(make_model("llama")), dtype="float32").model()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        StreamedModel(model, RUNNER).block_inputs(tokens)
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_autocast_runs_blocks_in_bfloat16(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    runner = BlockRunner(CPU, "bf16-mixed")
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
    inputs = streamed.block_inputs(tokens)
    assert inputs.hidden.dtype == torch.bfloat16
    block = runner.load(streamed.blocks[0])
    seen: list[torch.dtype] = []
    block.get_submodule("mlp").register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    runner.run(block, inputs.hidden, inputs.arguments[0])
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
