"""Optimizers, and the rates and schedules of what they train."""

from __future__ import annotations

import pytest
import torch

from slimplus.training.optimizers import ParameterKind, RateConfig, SignSGD, build_optimizer


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
