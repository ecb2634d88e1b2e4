"""Which steps of a training are taken: those whose gradient is finite and no larger than is sane."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

# From run to run the norms of a block's steps differ by a factor of 10 at most; AdamW forgives a large gradient, its
# second moment remembers it for a thousand steps.
EXPLODED = 100.0
REMEMBERED, NEEDED = 64, 8  # norms that the median is taken of, at most and at least
PATIENCE = 5  # bad steps in a row that end a training


class StepGuard:
    """Judges the gradient norm of each step.

    Attributes:
        norms: of the last steps that were taken.
        skipped: number of steps that were not.
        in_a_row: of these, since the last one that was.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.skipped = self.in_a_row = 0

    def admits(self, norm: float) -> bool:
        """Whether the step is to be taken."""
        usual = (median(self.norms) if len(self.norms) >= NEEDED else 0.0) or math.inf
        if math.isfinite(norm) and norm <= EXPLODED * usual:
            self.norms = [*self.norms, norm][-REMEMBERED:]
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    @property
    def diverged(self) -> bool:
        """Whether there is no point in going on."""
        return self.in_a_row >= PATIENCE

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        vars(self).update(state)
