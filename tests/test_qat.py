"""Quantizers that round at every step, and what trains them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from slimplus.distributed.deepspeed import _replace_parameters
from slimplus.format.affine import SCALE_BITS
from slimplus.models.architectures import is_norm
from slimplus.nn import FakeQuantizedLinear, LearnedRoundingLinear, PackedLinear, TrainedWeightLinear
from slimplus.nn.fake_quantized import ScaledLinear, nearest_level
from slimplus.quantization.gptq import RoundedWeight, quantize_weight
from slimplus.quantization.salience import invert_hessian
from slimplus.quantization.salience_calibration import calibrate_group
from slimplus.training.end_to_end import EndToEnd, EndToEndConfig
from slimplus.training.losses import LossConfig, normalized_error, reconstruction_loss
from slimplus.training.optimizers import ParameterKind, RateConfig, SignSGD, build_optimizer

GROUP_SIZE = 32
KINDS = (FakeQuantizedLinear, ScaledLinear, LearnedRoundingLinear, TrainedWeightLinear)

any_weight = given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 100),
    bits=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    scale_bits=st.sampled_from(SCALE_BITS),
)


def _rounded(rows: int, columns: int, bits: list[int], seed: int = 0, scale_bits: int = 16) -> RoundedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, 0] = 9.0  # beyond the ends of its grid
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inverse = invert_hessian(inputs.T @ inputs)
    widths = torch.tensor(bits[: -(-columns // GROUP_SIZE)], dtype=torch.int32)
    return quantize_weight(weight, widths, GROUP_SIZE, inverse, calibrate_group, True, scale_bits)


def _layer(kind: type[FakeQuantizedLinear], rounded: RoundedWeight, bias: Tensor | None = None) -> FakeQuantizedLinear:
    if issubclass(kind, LearnedRoundingLinear | TrainedWeightLinear):
        return kind(rounded.weight, bias, None, rounded.remainder)
    return kind(rounded.weight, bias)


@pytest.mark.parametrize("kind", KINDS)
@any_weight
@settings(max_examples=15)
def test_training_starts_from_what_was_calibrated(
    kind: type[FakeQuantizedLinear], rows: int, columns: int, bits: list[int], seed: int, scale_bits: int
) -> None:
    rounded = _rounded(rows, columns, bits, seed, scale_bits)
    start = _layer(kind, rounded).quantized_weight()
    assert torch.equal(start.integers, rounded.weight.integers)
    assert torch.equal(start.scale, rounded.weight.scale)
    assert torch.equal(start.zero_point, rounded.weight.zero_point)


@pytest.mark.parametrize("kind", KINDS)
@any_weight
@settings(max_examples=15)
def test_whatever_was_learned_is_packed_bit_for_bit(
    kind: type[FakeQuantizedLinear], rows: int, columns: int, bits: list[int], seed: int, scale_bits: int
) -> None:
    layer = _layer(kind, _rounded(rows, columns, bits, seed, scale_bits), torch.ones(rows))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*layer.grid, *layer.per_weight):
        parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
    packed = PackedLinear.from_quantized(layer.quantized_weight(), layer.bias)
    assert torch.equal(packed.to_linear().weight, layer.fake_quantized_weight())


def test_an_offset_moves_a_weight_by_one_level_at_most() -> None:
    rounded = _rounded(8, 64, [2, 3])
    layer = _layer(LearnedRoundingLinear, rounded)
    for sign in (-0.5, 0.5):
        layer.per_weight[0].data.fill_(sign)
        change = layer.quantized_weight().integers.int() - rounded.weight.integers.int()
        assert set(change.unique().tolist()) <= {0, int(2 * sign)}
        assert change.any()


def test_gradients_are_those_of_the_levels() -> None:
    """The offset's is the weight's times the scale, and none where the weight lies beyond the ends of the grid."""
    layer = _layer(LearnedRoundingLinear, _rounded(8, 64, [2, 3]))
    scale, _ = layer.qparams()
    layer.per_weight[0].data[0, 0, 0] = 5.0
    layer.fake_quantized_weight().sum().backward()
    gradient = layer.per_weight[0].grad
    assert gradient is not None
    assert gradient[0, 0, 0] == 0
    assert torch.equal(gradient[:, 1], scale[:, 1:].expand(-1, GROUP_SIZE))


def test_gradients_are_those_of_autograd_with_the_rounding_passed_straight_through() -> None:
    generator = torch.Generator().manual_seed(0)
    position = 6 * torch.rand(3, 2, GROUP_SIZE, generator=generator) - 1.5
    scale, zero_point = (torch.rand(3, 2, 1, generator=generator) + 0.5 for _ in range(2))
    largest = torch.tensor([[3.0], [1.0]])
    slope = torch.randn(position.shape, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (position, scale, zero_point)]
    levels = nearest_level(position, largest, scale, zero_point)
    gradients = torch.autograd.grad((levels * slope).sum(), leaves)
    clamped = position.minimum(largest).clamp(min=0)
    inside = (position.round() >= 0) & (position.round() <= largest)
    place = torch.where(inside, position, clamped.detach())
    integers = place + (clamped.round() - place).detach()
    chain = (integers - zero_point) * scale
    assert torch.equal(levels, ((clamped.round() - zero_point) * scale))
    for found, wanted in zip(gradients, torch.autograd.grad((chain * slope).sum(), leaves), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_grid_under_frozen_integers_are_those_of_autograd() -> None:
    layer = FakeQuantizedLinear(_rounded(8, 64, [2, 3]).weight, None).double()
    scale, zero_point = (values[..., None].detach().requires_grad_() for values in layer.qparams())
    slope = torch.randn(layer.integers.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels, chain = layer.levels(scale, zero_point), (layer.integers - zero_point) * scale
    assert torch.equal(levels, chain)
    wanted = torch.autograd.grad((chain * slope).sum(), (scale, zero_point))
    for found, expected in zip(torch.autograd.grad((levels * slope).sum(), (scale, zero_point)), wanted, strict=True):
        assert torch.allclose(found, expected)


def test_trained_weights_follow_the_straight_through_estimator() -> None:
    layer = _layer(TrainedWeightLinear, _rounded(8, 64, [2, 3]))
    layer.fake_quantized_weight().sum().backward()
    gradient = layer.per_weight[0].grad
    assert gradient is not None
    assert ((gradient - 1).abs() < 1e-6).logical_or(gradient == 0).all()
    assert (gradient != 0).any()


def test_a_rate_of_zero_freezes_the_groups_of_a_width() -> None:
    rounded = _rounded(8, 64, [2, 3])
    layer = LearnedRoundingLinear(rounded.weight, None, {3: 0.0}, rounded.remainder)
    layer.fake_quantized_weight().square().sum().backward()
    for parameter in (*layer.grid, *layer.per_weight):
        assert parameter.grad is not None
        assert parameter.grad[:, 0].any()
        assert not parameter.grad[:, 1].any()


def test_sign_sgd_moves_by_its_rate_within_the_bound() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.49, 0.2]))
    parameter.grad = torch.tensor([1e-9, -5.0, -1.0, 0.0])
    SignSGD([{"params": [parameter], "bound": 0.5}], lr=0.1).step()
    assert torch.allclose(parameter.detach(), torch.tensor([-0.1, 0.1, 0.5, 0.2]))


@pytest.mark.parametrize("name", ["sign_sgd", "adamw", "adamw_8bit"])
def test_each_kind_has_a_rate_and_a_schedule_of_its_own(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    kinds = [
        ParameterKind([torch.nn.Parameter(torch.ones(8))], RateConfig(0.5, "linear"), 2.0),
        ParameterKind([torch.nn.Parameter(torch.ones(8))], RateConfig(None, "constant"), unit=0.25),
        ParameterKind([], RateConfig()),
    ]
    built = build_optimizer(name, kinds, 10, 0.0)  # type: ignore[arg-type]
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for kind in kinds:
            for parameter in kind.parameters:
                parameter.grad = torch.ones(8)
        optimizer.step()
        schedule.step()
    assert [first for first, _ in rates] == pytest.approx([0.5 * (1 - step / 10) for step in range(10)])
    assert {second for _, second in rates} == {0.05}
    assert all((kind.parameters[0] < 1).all() for kind in kinds[:2])


def test_a_norm_learns_in_parts_of_its_mean_gain() -> None:
    """Or a step of Adam is 5% of the gains in the first block of SmolLM2, and 0.05% in its last norm."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3
    )
    model = LlamaForCausalLM(config).eval()
    norms = {name: norm for name, norm in model.named_modules() if is_norm(norm)}
    for norm, gain in zip(norms.values(), (0.02, 0.3, 0.02, 0.3, 1.0, 1.0, 2.0), strict=True):
        torch.nn.init.constant_(norm.weight, gain)
    training = EndToEndConfig(1, 1, norms=RateConfig(0.01, "constant"), next_token=1, distillation=0)
    module = EndToEnd(model, None, training, "32-true")
    optimizer = build_optimizer("adamw", module.kinds(), 10, 0.0)["optimizer"]
    before = {name: norm.weight.detach().clone() for name, norm in norms.items()}
    module.loss((torch.randint(64, (1, 16)),)).backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 4  # of about the same gains
    for name, norm in norms.items():
        moved = (norm.weight.detach() - before[name]).abs() / before[name].mean()
        assert 0.007 < float(moved.median()) < 0.0145


def test_the_gains_alone_tell_the_rate_of_a_norm_with_biases() -> None:
    """And what is trained are the norms' parameters of the moment: ZeRO replaces them after every attempt."""
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_attention_heads=2, num_hidden_layers=2)
    module = EndToEnd(OPTForCausalLM(config).eval(), None, EndToEndConfig(1, 1, next_token=1), "32-true")
    _, norms = module.kinds()
    assert norms.unit == 1
    _replace_parameters(module)
    _, norms = module.kinds()
    assert len(norms.parameters) == 2 * (2 * 2 + 1)
    assert {id(parameter) for parameter in norms.parameters} <= {id(parameter) for parameter in module.parameters()}


OUTPUTS = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))


def test_losses() -> None:
    errors = (OUTPUTS - TARGETS).square().sum(-1)
    energies = TARGETS.square().sum(-1)
    torch.testing.assert_close(
        reconstruction_loss(OUTPUTS, TARGETS, LossConfig("mse")), torch.nn.functional.mse_loss(OUTPUTS, TARGETS)
    )
    torch.testing.assert_close(normalized_error(OUTPUTS, TARGETS), (errors / energies).mean())
    kept = (errors / energies).sort().values[:, :6]  # of each window, so that windows may be taken one by one
    torch.testing.assert_close(reconstruction_loss(OUTPUTS, TARGETS, LossConfig(trim_fraction=0.25)), kept.mean())


def test_the_loss_behind_a_norm_and_with_channel_weights() -> None:
    double = reconstruction_loss(OUTPUTS, TARGETS, LossConfig("after_norm"), torch.nn.RMSNorm(16))
    scaled = reconstruction_loss(3 * OUTPUTS, 3 * TARGETS, LossConfig("after_norm"), torch.nn.RMSNorm(16))
    torch.testing.assert_close(double, scaled)
    channels = torch.zeros(16)
    channels[3] = 2.0
    one = reconstruction_loss(OUTPUTS, TARGETS, LossConfig("mse"), channels=channels)
    torch.testing.assert_close(one, 2 * (OUTPUTS - TARGETS)[..., 3].square().mean() / 16)
