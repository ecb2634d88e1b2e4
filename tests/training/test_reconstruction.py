"""The training of a block against its full-precision outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from slimplus.blockwise.quantizer import QuantizerConfig
from slimplus.blockwise.swap import (
    fake_quantized_block,
    packed_block,
    trained_weights,
)
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.format.affine import QuantizedWeight, grid_positions
from slimplus.models.architectures import find_linears
from slimplus.models.block_arguments import run_block
from slimplus.models.streaming import BlockInputs
from slimplus.nn.fake_quantized import TrainedWeightLinear
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit, FitConfig
from slimplus.training.losses import normalized_error
from slimplus.training.optimizers import RateConfig
from slimplus.training.reconstruction import BlockReconstruction, ReconstructionConfig
from slimplus.utils.manifest import Manifest
from tests.support.blocks import RUNNER, block_error, quantize_first_block


def _fit(
    block_and_inputs: tuple[nn.Module, BlockInputs],
    folder: Path,
    epochs: int = 12,
    stop_after: int | None = None,
    per_weight: Literal["rounding", "weights"] | None = None,
    config: ReconstructionConfig | None = None,
) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    original, result = quantize_first_block(block_and_inputs, "slimllm")
    inputs = block_and_inputs[1]
    module = BlockReconstruction(
        fake_quantized_block(original, result, QuantizerConfig(per_weight, {})),
        inputs.arguments[0],
        config or ReconstructionConfig(epochs, 2, grid=RateConfig(1e-2, "cosine")),
        "32-true",
    )
    if stop_after is not None:
        module.on_train_epoch_start = lambda: _stop(module, stop_after)  # type: ignore[method-assign]
    targets = RUNNER.run(original, inputs.hidden, inputs.arguments[0])
    fabric = launch("cpu", 1, 1, "auto")
    checkpoints = TrainingCheckpoints(folder / "checkpoints", Manifest(folder), "")
    where = FitConfig(1, 1, "auto", "none", folder / "logs", seed=0, checkpoint_seconds=3600)
    Fit(module, (inputs.hidden, targets), "block_000", checkpoints, fabric, where, Preemption())()
    return original, trained_weights(module.block)


class _Killed(RuntimeError):
    pass


def _stop(module: BlockReconstruction, epoch: int) -> None:
    if module.current_epoch == epoch:
        raise _Killed


def test_training_lowers_the_error_and_touches_quantizers_only(
    block_and_inputs: tuple[nn.Module, BlockInputs], tmp_path: Path
) -> None:
    original, result = quantize_first_block(block_and_inputs, "slimllm")
    calibrated = result.weights
    trainable = fake_quantized_block(original, result, QuantizerConfig(None, {}))
    names = {name.rpartition(".")[2] for name, p in trainable.named_parameters() if p.requires_grad}
    assert names == {"low_shift", "high_shift"}
    _, trained = _fit(block_and_inputs, tmp_path)
    block, inputs = block_and_inputs
    before = block_error(packed_block(block, calibrated), original, inputs)
    after = block_error(packed_block(block, trained), original, inputs)
    assert after < 0.95 * before
    assert all(torch.equal(trained[name].integers, calibrated[name].integers) for name in calibrated)


def test_what_is_logged(block_and_inputs: tuple[nn.Module, BlockInputs], tmp_path: Path) -> None:
    _fit(block_and_inputs, tmp_path, epochs=2)
    header = (tmp_path / "logs/csv/block_000/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss_step", "loss_epoch", "grad_norm", "lr-AdamW"} <= set(header)
    assert list((tmp_path / "logs/tensorboard/block_000").glob("events*"))


def test_training_resumed_from_a_checkpoint_ends_the_same(
    block_and_inputs: tuple[nn.Module, BlockInputs], tmp_path: Path
) -> None:
    _, undisturbed = _fit(block_and_inputs, tmp_path / "undisturbed", epochs=4)
    with pytest.raises(_Killed):
        _fit(block_and_inputs, tmp_path / "killed", epochs=4, stop_after=2)
    assert (tmp_path / "killed/checkpoints/last.ckpt").exists()
    _, resumed = _fit(block_and_inputs, tmp_path / "killed", epochs=4)
    for name, weight in undisturbed.items():
        assert torch.equal(weight.zero_point, resumed[name].zero_point)
        assert torch.equal(weight.scale, resumed[name].scale)


def test_autocast_trains_in_bfloat16_and_keeps_parameters_in_float32(
    block_and_inputs: tuple[nn.Module, BlockInputs],
) -> None:
    original, result = quantize_first_block(block_and_inputs, "slimllm")
    inputs = block_and_inputs[1]
    block = fake_quantized_block(original, result, QuantizerConfig(None, {}))
    seen: list[torch.dtype] = []
    block.get_submodule("mlp").register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    module = BlockReconstruction(block, inputs.arguments[0], ReconstructionConfig(1, 1), "bf16-mixed")
    loss = normalized_error(module(inputs.hidden[:1]), run_block(original, inputs.hidden[:1], inputs.arguments[0]))
    loss.backward()
    assert seen == [torch.bfloat16]
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_small_gradients_survive_float16(
    block_and_inputs: tuple[nn.Module, BlockInputs], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over thousands of tokens of large energy has gradients below the smallest number of float16."""
    original, result = quantize_first_block(block_and_inputs, "slimllm")
    hidden, arguments = block_and_inputs[1].hidden[:1], block_and_inputs[1].arguments[0]
    block = fake_quantized_block(original, result, QuantizerConfig(None, {}))
    module = BlockReconstruction(block, arguments, ReconstructionConfig(1, 1), precision)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "loss", lambda batch: 1e-7 * normalized_error(module(batch[0]), batch[1]))
    module.training_step((hidden, run_block(original, hidden, arguments)), 0).backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and (g != 0).float().mean() > 0.9 for g in gradients)


def test_an_element_rate_of_zero_rounds_the_calibrated_weights_to_the_trained_grid(
    block_and_inputs: tuple[nn.Module, BlockInputs], tmp_path: Path
) -> None:
    config = ReconstructionConfig(4, 2, grid=RateConfig(1e-2, "cosine"), per_weight=RateConfig(0.0, "cosine"))
    original, trained = _fit(block_and_inputs, tmp_path, per_weight="weights", config=config)
    rounded = quantize_first_block(block_and_inputs, "slimllm")[1]
    block = fake_quantized_block(original, rounded, QuantizerConfig("weights", {}))
    calibrated = trained_weights(block)
    assert any(not torch.equal(trained[name].integers, calibrated[name].integers) for name in calibrated)
    for name, weight in trained.items():  # the integers are those of the untouched weights on the grid as it ends
        layer = block.get_submodule(name)
        assert isinstance(layer, TrainedWeightLinear)
        with torch.no_grad():
            expected = layer.rounded(weight.scale[..., None], weight.zero_point[..., None]).flatten(1)
        assert torch.equal(weight.integers, expected[:, : layer.in_features].to(torch.uint8))


@pytest.mark.parametrize("per_weight", ["rounding", "weights"])
def test_training_may_start_at_the_levels_nearest_to_the_weights(
    block_and_inputs: tuple[nn.Module, BlockInputs], per_weight: Literal["rounding", "weights"]
) -> None:
    """And the loss before it, which it is held against, stays that of the calibrated weights."""
    original, result = quantize_first_block(block_and_inputs, "slimllm")
    block = fake_quantized_block(original, result, QuantizerConfig(per_weight, {}, "nearest"))
    module = BlockReconstruction(block, block_and_inputs[1].arguments[0], ReconstructionConfig(1, 1), "32-true")
    calibrated = trained_weights(block)
    assert all(torch.equal(weight.integers, result.weights[name].integers) for name, weight in calibrated.items())
    module.begin()
    started = trained_weights(block)
    assert any(not torch.equal(weight.integers, calibrated[name].integers) for name, weight in started.items())
    for name, weight in started.items():
        grid = result.weights[name]
        expected = grid_positions(find_linears(original)[name].weight, grid).round().to(torch.uint8)
        assert (weight.integers != expected).float().mean() < 1e-3  # the weights that lie half-way
        assert torch.equal(weight.scale, grid.scale)
