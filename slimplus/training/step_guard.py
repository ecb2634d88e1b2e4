"""The guard that decides which steps of a training are taken, by the norm of their gradients."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

# Factor on the median norm above which a gradient has exploded. The norms of a block's steps usually differ by a factor
# of 10 at most. AdamW makes an ordinary step of an exploded gradient, but its second moment then shortens many steps.
EXPLODED = {"adamw": 100.0, "adamw_8bit": 100.0, "sign_sgd": math.inf}
"""Name of an optimizer → that factor; a step along the signs of a gradient is as long whatever its norm."""

REMEMBERED, NEEDED = 64, 8  # largest and smallest number of norms that the median is taken of
PATIENCE = 5  # bad steps in a row that end a training


class StepGuard:
    """Judge of each step's gradient norm, which must be finite and not exploded.

    Args:
        exploded: factor on the median norm above which a gradient has exploded.

    Attributes:
        norms: gradient norms of the last steps taken.
        skipped: number of steps skipped so far.
        in_a_row: number of steps skipped since the last step taken.
    """

    def __init__(self, exploded: float) -> None:
        self._exploded = exploded
        self.norms: list[float] = []
        self.skipped = self.in_a_row = 0

    def admits(self, norm: float) -> bool:
        """Return whether to take the step whose gradient has this norm, and count the step."""
        usual = (median(self.norms) if len(self.norms) >= NEEDED else 0.0) or math.inf
        if math.isfinite(norm) and norm <= self._exploded * usual:
            self.norms = [*self.norms, norm][-REMEMBERED:]
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row were skipped that the training has diverged."""
        return self.in_a_row >= PATIENCE

    def state_dict(self) -> dict[str, Any]:
        """Return what the guard has seen, for a checkpoint."""
        return {"norms": self.norms, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        vars(self).update(state)
