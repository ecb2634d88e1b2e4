"""What every training has in common, on a module of four numbers: how it is judged, ended and begun anew."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.models.precision import LOSS_SCALES
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit, FitConfig, FitResult
from slimplus.training.module import JUDGED, QuantizerTraining, TrainingConfig
from slimplus.training.optimizers import ParameterKind, RateConfig
from slimplus.utils.manifest import Manifest


class _Noisy(QuantizerTraining):
    """Its loss is higher while it trains than when it is measured, as that of an epoch is than that of its end."""

    def __init__(self, config: TrainingConfig, noise: float) -> None:
        super().__init__(config, "32-true")
        self.value, self.noise = nn.Parameter(torch.ones(4)), noise

    def kinds(self) -> list[ParameterKind]:
        return [ParameterKind([self.value], self.config.grid)]

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return (self.value - batch[0]).square().mean() + (self.noise if torch.is_grad_enabled() else 0.0)


def _fit_toy(module: QuantizerTraining, data: Tensor, folder: Path) -> FitResult:
    where = FitConfig(1, 1, "auto", "none", folder / "logs", seed=0, checkpoint_seconds=3600)
    checkpoints = TrainingCheckpoints(folder / "checkpoints", Manifest(folder), "")
    return Fit(module, (data,), "toy", checkpoints, launch("cpu", 1, 1, "auto"), where, Preemption())()


def test_any_number_of_ranks_judges_by_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)  # each rank's half is looked at alone
    where = FitConfig(1, 1, "auto", "none", tmp_path / "logs", seed=0, checkpoint_seconds=3600)
    windows = torch.arange(64.0)[:, None].expand(64, 4)
    module = _Noisy(TrainingConfig(1, 1), 0.0)

    def judged(ranks: int) -> float:
        means = []
        for rank in range(ranks):
            checkpoints = TrainingCheckpoints(tmp_path, Manifest(tmp_path), "")
            fabric = cast(Fabric, SimpleNamespace(global_rank=rank, world_size=ranks, device=torch.device("cpu")))
            means.append(
                Fit(module, (windows[rank::ranks],), "toy", checkpoints, fabric, where, Preemption())._evaluate()
            )
        return sum(means)

    part = judged(1)
    assert part == pytest.approx((windows[:JUDGED] - 1).square().mean().item())
    assert [judged(2), judged(4)] == pytest.approx([part, part])


@pytest.mark.parametrize(("noise", "target", "helped"), [(0.0, 0.0, True), (9.0, 0.0, True), (9.0, 1.001, False)])
def test_a_training_is_judged_by_its_end(tmp_path: Path, noise: float, target: float, helped: bool) -> None:
    """Near the target, steps of one size go past it."""
    module = _Noisy(TrainingConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(0.1, "constant")), noise)
    data = torch.full((3, 4), target)
    result = _fit_toy(module, data, tmp_path)
    assert result.helped is helped
    assert result.loss == pytest.approx(float(module.evaluate([(data,)])))


@pytest.mark.parametrize(("target", "attempts"), [(1.06, 1), (1.01, 2), (1.001, 2)])
def test_a_training_that_does_not_help_is_tried_at_a_lower_rate(tmp_path: Path, target: float, attempts: int) -> None:
    """Three steps of 0.1 go too far from 1 for all but the first target, three of 0.01 for the last one as well."""
    module = _Noisy(TrainingConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(0.1, "constant")), 0.0)
    result = _fit_toy(module, torch.full((3, 4), target), tmp_path)
    assert len(result.events) == attempts - 1
    if attempts > 1:
        assert "; training started over at a tenth of the learning rate" in result.events[0]
        assert "training ended at a loss of 0.00" in result.events[0]
    assert result.helped is (target != 1.001)


@pytest.mark.parametrize(("patience", "epochs"), [(None, 6), (2, 3)])
def test_patience_ends_a_training_that_gets_no_better(tmp_path: Path, patience: int | None, epochs: int) -> None:
    module = _Noisy(TrainingConfig(6, 1, optimizer="sign_sgd", patience=patience), noise=0.0)
    steps = Mock(wraps=module.training_step)
    module.training_step = steps  # type: ignore[method-assign]
    _fit_toy(module, torch.ones(4, 4), tmp_path)  # where its value is
    assert steps.call_count == 4 * epochs


def test_a_loss_is_the_same_however_many_windows_are_judged_at_once() -> None:
    module, data = _Noisy(TrainingConfig(1, 1), noise=0.0), torch.tensor([[1.0], [2.0], [4.0]])
    at_once, alone = (float(module.evaluate(zip(data.split(windows)))) for windows in (2, 1))
    assert at_once == alone == pytest.approx(10 / 3)


def test_a_training_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its windows and its block are gone with the last name for them, not when Python next looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        module = _Noisy(TrainingConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(0.1, "constant")), 0.0)
        data = torch.zeros(3, 4)
        _fit_toy(module, data, tmp_path)
        left: list[weakref.ref[object]] = [weakref.ref(data), weakref.ref(module)]
        del data, module
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


class _Overflowing(_Noisy):
    """Its gradient is 30 for every element, times the factor on the loss, in float16."""

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return (self.value.half() * 30).float().sum() + batch[0].sum()


def test_an_overflow_of_float16_lowers_the_factor_on_the_loss(tmp_path: Path) -> None:
    """It neither ends the training nor lowers its rates."""
    module = _Overflowing(TrainingConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(0.1, "constant")), 0.0)
    module.loss_scale = LOSS_SCALES["16-mixed"]
    steps = 12
    result = _fit_toy(module, torch.zeros(steps, 4), tmp_path)
    assert module.loss_scale == 2**11  # 30 * 2**12 is more than float16 holds
    assert result.skipped == 5
    assert result.events == ()
    torch.testing.assert_close(module.value.detach(), torch.full((4,), 1 - 0.1 * (steps - 5)))


class _Diverging(_Overflowing):
    """At the full rate, once the factor on the loss is low enough."""

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        bad = self.slowdown == 1 and self.loss_scale <= 2**11 and torch.is_grad_enabled()
        return super().loss(batch) * (torch.nan if bad else 1)


def test_a_second_attempt_begins_as_it_would_in_a_new_process(tmp_path: Path) -> None:
    """Or a job that is killed between the two would end with other bytes."""
    module = _Diverging(TrainingConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(0.1, "constant")), 0.0)
    module.loss_scale = LOSS_SCALES["16-mixed"]
    result = _fit_toy(module, torch.zeros(40, 4), tmp_path)
    assert len(result.events) == 1
    assert (result.skipped, module.loss_scale) == (5, 2**11)
