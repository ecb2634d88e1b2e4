"""Blocks: their calibration, their training, and that what was trained is what gets packed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import ModelMaker
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimplus.blockwise.calibrate import BlockResult, quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.quantizer import QuantizerConfig
from slimplus.blockwise.swap import (
    fake_quantized_block,
    load_packed_block,
    packed_block,
    packed_tensors,
    trained_weights,
)
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.format.affine import QuantizedWeight, choose_qparams, quantize, storable_scale, storable_zero_point
from slimplus.models.architectures import find_linears
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockInputs, BlockRunner, StreamedModel, run_block
from slimplus.nn import FakeQuantizedLinear, PackedLinear
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit, FitConfig
from slimplus.training.losses import normalized_error
from slimplus.training.optimizers import RateConfig
from slimplus.training.reconstruction import BlockReconstruction, ReconstructionConfig
from slimplus.utils.manifest import Manifest

CPU = torch.device("cpu")
RUNNER = BlockRunner(CPU, "32-true")
GROUP_SIZE = 32


def _quantized(rows: int, columns: int, bits: list[int], seed: int = 0) -> QuantizedWeight:
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    widths = torch.tensor(bits, dtype=torch.int32)
    scale, zero_point = choose_qparams(target, widths, GROUP_SIZE)
    scale, zero_point = storable_scale(scale), storable_zero_point(zero_point, widths)
    return QuantizedWeight(
        quantize(target, scale, zero_point, widths, GROUP_SIZE), scale, zero_point, widths, GROUP_SIZE
    )


@given(
    st.integers(1, 33),
    st.integers(1, 100),
    st.lists(st.integers(1, 8), min_size=4, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
)
@settings(max_examples=60)
@example(rows=21, columns=48, bits=[1, 1, 1, 1], seed=1, with_bias=False)  # a scale of 1e-6, a zero point far outside
def test_fake_quantized_equals_packed_bit_for_bit(
    rows: int, columns: int, bits: list[int], seed: int, with_bias: bool
) -> None:
    """Whatever training made of the shifts, wild values included."""
    weight = _quantized(rows, columns, bits[: -(-columns // GROUP_SIZE)], seed)
    bias = torch.randn(rows) if with_bias else None
    layer = FakeQuantizedLinear(weight, bias)
    generator = torch.Generator().manual_seed(seed)
    for shift in (layer.low_shift, layer.high_shift):
        shift.data += torch.randn(shift.shape, generator=generator)
    packed = PackedLinear.from_quantized(layer.quantized_weight(), bias)
    assert torch.equal(packed.dequantize(), layer.fake_quantized_weight())
    inputs = torch.randn(3, columns, generator=generator)
    torch.testing.assert_close(
        packed(inputs), layer(inputs), rtol=1e-5, atol=1e-5
    )  # the same weight, laid out otherwise


def test_untrained_quantizers_are_the_calibrated_ones() -> None:
    weight = _quantized(16, 128, [1, 2, 3, 4])
    trained = FakeQuantizedLinear(weight, None).quantized_weight()
    for name in ("integers", "scale", "zero_point", "bits"):
        assert torch.equal(getattr(trained, name), getattr(weight, name)), name


def test_packed_layer_that_does_not_fit_its_columns() -> None:
    with pytest.raises(ValueError, match="does not describe 3 groups"):
        PackedLinear(96, 16, GROUP_SIZE, {2: 4})


def test_one_massive_token_does_not_rule_the_loss() -> None:
    target = torch.ones(1, 4, 8)
    target[0, 0] = 1e4
    output = target.clone()
    output[0, 0] *= 1.1  # 10 % off, like the others
    massive = normalized_error(output, target)
    output[0] = target[0] * 1.1
    assert massive == pytest.approx(0.01 / 4, rel=1e-3)
    assert normalized_error(output, target) == pytest.approx(0.01, rel=1e-3)


@pytest.fixture(scope="module")
def block_and_inputs(make_model: ModelMaker) -> tuple[nn.Module, BlockInputs]:
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), RUNNER)
    tokens = torch.randint(1, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    return streamed.blocks[0], streamed.block_inputs(tokens)


def _quantize(
    block_and_inputs: tuple[nn.Module, BlockInputs], method: str, bits: dict[str, Tensor] | None = None
) -> tuple[nn.Module, BlockResult]:
    block, inputs = block_and_inputs
    search = "slimllm" if method == "slimllm" else "uniform"
    config = QuantizationConfig(method, 2, GROUP_SIZE, allocation=search)  # type: ignore[arg-type]
    original = RUNNER.load(block)
    data = BlockData(original, inputs.hidden, inputs.arguments[0], RUNNER)
    return original, quantize_block(data, config, bits)


def _error(block: nn.Module, original: nn.Module, inputs: BlockInputs) -> float:
    output = RUNNER.run(RUNNER.load(block), inputs.hidden, inputs.arguments[0])
    return float(normalized_error(output, RUNNER.run(original, inputs.hidden, inputs.arguments[0])))


def test_layers_that_read_the_same_tensor_share_a_hessian(
    block_and_inputs: tuple[nn.Module, BlockInputs],
) -> None:
    block, inputs = block_and_inputs
    data = BlockData(RUNNER.load(block), inputs.hidden, inputs.arguments[0], RUNNER)
    assert data.leader["self_attn.k_proj"] == data.leader["self_attn.v_proj"] == "self_attn.q_proj"
    assert data.leader["mlp.up_proj"] == "mlp.gate_proj"
    assert len(set(data.leader.values())) == 4


def test_each_method_is_better_than_the_one_before(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    errors = {}
    for method in ("rtn", "gptq", "slimllm"):
        original, result = _quantize(block_and_inputs, method)
        packed = packed_block(block_and_inputs[0], result.weights)
        errors[method] = _error(packed, original, block_and_inputs[1])
    assert errors["slimllm"] < errors["gptq"] < errors["rtn"]


def test_given_bits_are_used(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    layers = find_linears(block_and_inputs[0])
    bits = {name: torch.full((-(-layer.in_features // 32),), 3) for name, layer in layers.items()}
    _, result = _quantize(block_and_inputs, "slimllm", bits)
    assert all(torch.equal(result.weights[name].bits, bits[name]) for name in layers)


def test_calibration_leaves_the_block_alone(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    original, _ = _quantize(block_and_inputs, "slimllm")
    untouched = RUNNER.load(block_and_inputs[0])
    for mine, theirs in zip(original.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(module._forward_pre_hooks for module in original.modules())


def test_packed_tensors_restore_a_block(block_and_inputs: tuple[nn.Module, BlockInputs]) -> None:
    block, inputs = block_and_inputs
    original, result = _quantize(block_and_inputs, "gptq")
    packed = packed_block(block, result.weights)
    restored = load_packed_block(block, packed_tensors(packed), GROUP_SIZE)
    arguments = inputs.arguments[0]
    ours = RUNNER.run(RUNNER.load(restored), inputs.hidden, arguments)
    assert torch.equal(ours, RUNNER.run(RUNNER.load(packed), inputs.hidden, arguments))


def _fit(
    block_and_inputs: tuple[nn.Module, BlockInputs],
    folder: Path,
    epochs: int = 12,
    stop_after: int | None = None,
    per_weight: Literal["rounding", "weights"] | None = None,
    config: ReconstructionConfig | None = None,
) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    original, result = _quantize(block_and_inputs, "slimllm")
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
    original, result = _quantize(block_and_inputs, "slimllm")
    calibrated = result.weights
    trainable = fake_quantized_block(original, result, QuantizerConfig(None, {}))
    names = {name.rpartition(".")[2] for name, p in trainable.named_parameters() if p.requires_grad}
    assert names == {"low_shift", "high_shift"}
    _, trained = _fit(block_and_inputs, tmp_path)
    block, inputs = block_and_inputs
    before = _error(packed_block(block, calibrated), original, inputs)
    after = _error(packed_block(block, trained), original, inputs)
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
    original, result = _quantize(block_and_inputs, "slimllm")
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
    original, result = _quantize(block_and_inputs, "slimllm")
    hidden, arguments = block_and_inputs[1].hidden[:1], block_and_inputs[1].arguments[0]
    block = fake_quantized_block(original, result, QuantizerConfig(None, {}))
    module = BlockReconstruction(block, arguments, ReconstructionConfig(1, 1), precision)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "loss", lambda batch: 1e-7 * normalized_error(module(batch[0]), batch[1]))
    module.training_step((hidden, run_block(original, hidden, arguments)), 0).backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and (g != 0).float().mean() > 0.9 for g in gradients)
