"""Optimizers of the quantizers, with a learning rate and a schedule for each kind of parameter."""

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
    """Learning rate of one kind of parameter.

    Attributes:
        learning_rate: peak of the rate. None stands for 2 over the number of steps: under the linear schedule, steps by
            the gradient's sign then move a parameter by one unit at most.
        schedule: shape of the rate's fall to zero; `constant` does not fall.
    """

    learning_rate: float | None = None
    schedule: Schedule = "linear"

    def peak(self, steps: int) -> float:
        """Return the peak of the rate for a training of `steps` steps."""
        return 2 / steps if self.learning_rate is None else self.learning_rate

    def factor(self, steps: int, warmup: int = 0) -> Callable[[int], float]:
        """Return a function from a step to a factor on the peak, with a linear rise over `warmup` steps.

        Args:
            steps: number of steps of the whole training.
            warmup: number of steps over which the rate rises.
        """
        falls = {
            "constant": lambda done: 1.0,
            "linear": lambda done: 1 - done,
            "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        }[self.schedule]
        return lambda step: min((step + 1) / (warmup + 1), 1.0) * falls(min(step / max(steps, 1), 1.0))


@dataclass(frozen=True)
class ParameterKind:
    """Parameters that share a learning rate and a bound.

    Attributes:
        parameters: the parameters.
        rate: their learning rate, in parts of `unit`.
        bound: largest magnitude that the parameters may have; only `sign_sgd` enforces it.
        unit: typical size of the parameters, by which the rate is multiplied.
    """

    parameters: list[nn.Parameter]
    rate: RateConfig
    bound: float = math.inf
    unit: float = 1.0


class SignSGD(Optimizer):
    """Optimizer that moves every parameter by the learning rate, against its gradient's sign (arXiv 1802.04434).

    The gradient of a rounding is an estimate whose sign can be trusted more than its size. The optimizer has no state.

    Args:
        params: parameters or parameter groups.
        lr: the learning rate.
        bound: largest magnitude that a parameter may have.
    """

    def __init__(self, params: Any, lr: float = 1e-3, bound: float = math.inf) -> None:
        super().__init__(params, {"lr": lr, "bound": bound})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient, and return the closure's loss, if there is a closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign_(), alpha=-group["lr"])  # nobody needs it any longer
                    parameter.clamp_(-group["bound"], group["bound"])
        return loss


def build_optimizer(
    name: Name, kinds: list[ParameterKind], steps: int, weight_decay: float, warmup: int = 0, slowdown: float = 1.0
) -> dict[str, Any]:
    """Build an optimizer and its schedule, in the form that `LightningModule.configure_optimizers` returns.

    Args:
        name: the optimizer; `adamw_8bit` is the AdamW of bitsandbytes, whose moments take one byte each.
        kinds: kinds of parameters, each a group of the optimizer; a kind without parameters is left out.
        steps: number of steps of the whole training.
        weight_decay: weight decay of `adamw` and `adamw_8bit`.
        warmup: number of steps over which the learning rates rise.
        slowdown: factor on the learning rates.

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed, for `adamw_8bit`.
    """
    kinds = [kind for kind in kinds if kind.parameters]
    groups: list[dict[str, Any]] = [
        {"params": kind.parameters, "lr": slowdown * kind.rate.peak(steps) * kind.unit} for kind in kinds
    ]
    optimizer: Optimizer
    if name == "sign_sgd":
        optimizer = SignSGD([group | {"bound": kind.bound} for group, kind in zip(groups, kinds, strict=True)])
    elif name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # an import of a second

        optimizer = AdamW8bit(groups, weight_decay=weight_decay, betas=(0.9, 0.95))
    else:
        optimizer = AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, [kind.rate.factor(steps, warmup) for kind in kinds])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
