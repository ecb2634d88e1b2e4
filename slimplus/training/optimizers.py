"""Optimizers of the quantizers: each group of parameters has a rate and a schedule of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Name = Literal["sign_sgd", "adamw", "adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class RateConfig:
    """How fast one kind of parameter learns.

    Attributes:
        learning_rate: peak. None is 2 over the number of steps, with which a sign step and the linear schedule carry a
            parameter one unit in all.
        schedule: how it falls to zero.
    """

    learning_rate: float | None = None
    schedule: Schedule = "linear"

    def peak(self, steps: int) -> float:
        """The peak for a training of `steps`."""
        return 2 / steps if self.learning_rate is None else self.learning_rate

    def factor(self, steps: int, warmup: int = 0) -> Callable[[int], float]:
        """Step → part of the peak, after a linear rise over `warmup` steps."""
        falls = {
            "constant": lambda done: 1.0,
            "linear": lambda done: 1 - done,
            "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        }[self.schedule]
        return lambda step: min((step + 1) / (warmup + 1), 1.0) * falls(min(step / max(steps, 1), 1.0))


@dataclass(frozen=True)
class ParameterKind:
    """Parameters that learn alike.

    Attributes:
        parameters: of a module.
        rate: of their learning.
        bound: largest magnitude, if they have one; kept by `sign_sgd`.
        unit: of the rate, where parameters are of another size than one.
    """

    parameters: list[nn.Parameter]
    rate: RateConfig
    bound: float = math.inf
    unit: float = 1.0


class SignSGD(Optimizer):
    """Moves every parameter by the learning rate, against the sign of its gradient (arXiv 1802.04434).

    Where the gradient passes a rounding, its size means little and its sign much; it needs no state.
    """

    def __init__(self, params: Any, lr: float = 1e-3, bound: float = math.inf) -> None:
        super().__init__(params, {"lr": lr, "bound": bound})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
                    parameter.clamp_(-group["bound"], group["bound"])
        return loss


def build_optimizer(
    name: Name, kinds: list[ParameterKind], steps: int, weight_decay: float, warmup: int = 0, slowdown: float = 1.0
) -> dict[str, Any]:
    """Optimizer and schedule as `LightningModule.configure_optimizers` gives them.

    Args:
        name: `adamw_8bit` is bitsandbytes' AdamW, whose moments take a byte each.
        kinds: a group of the optimizer each; those without parameters are left out.
        steps: of the whole training.
        weight_decay: of the AdamWs.
        warmup: steps over which the rates rise.
        slowdown: part of the learning rates that is used.

    Raises:
        ModuleNotFoundError: `adamw_8bit` without bitsandbytes.
    """
    kinds = [kind for kind in kinds if kind.parameters]
    groups: list[dict[str, Any]] = [
        {"params": kind.parameters, "lr": slowdown * kind.rate.peak(steps) * kind.unit} for kind in kinds
    ]
    optimizer: Optimizer
    if name == "sign_sgd":
        optimizer = SignSGD([group | {"bound": kind.bound} for group, kind in zip(groups, kinds, strict=True)])
    elif name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # takes a second, and comes with the extra `qat`

        optimizer = AdamW8bit(groups, weight_decay=weight_decay, betas=(0.9, 0.95))
    else:
        optimizer = AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, [kind.rate.factor(steps, warmup) for kind in kinds])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
