"""Losses between the outputs of two blocks."""

from __future__ import annotations

import pytest
import torch

from slimplus.training.losses import LossConfig, normalized_error, reconstruction_loss


def test_one_massive_token_does_not_rule_the_loss() -> None:
    target = torch.ones(1, 4, 8)
    target[0, 0] = 1e4
    output = target.clone()
    output[0, 0] *= 1.1  # 10 % off, like the others
    massive = normalized_error(output, target)
    output[0] = target[0] * 1.1
    assert massive == pytest.approx(0.01 / 4, rel=1e-3)
    assert normalized_error(output, target) == pytest.approx(0.01, rel=1e-3)


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


def test_a_token_that_is_massive_in_the_quantized_block_alone_does_not_rule_the_loss() -> None:
    """Its error is bounded by its own energy, and its gradient still leads back."""
    target = torch.ones(1, 4, 8)
    output = 1.1 * target
    output[0, 0] *= 1e4
    output.requires_grad_()
    error = normalized_error(output, target)
    error.backward()
    assert error.item() == pytest.approx((4 + 3 * 0.01) / 4, rel=1e-3)
    assert output.grad is not None
    assert (output.grad > 0).all()
    assert output.grad[0, 0].sum() < output.grad[0, 1].sum()
    twice = 2 * target  # up to there, errors are what they are
    assert normalized_error(twice, target) == 1
