"""Which steps of a training are taken."""

from __future__ import annotations

import json
import math

from slimplus.training.step_guard import EXPLODED, StepGuard


def test_which_gradients_are_admitted() -> None:
    guard = StepGuard(EXPLODED["adamw"])
    assert all(guard.admits(norm) for norm in (1e6, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0))  # too few to tell
    assert guard.admits(3.0)
    assert not guard.admits(101.0)
    assert guard.admits(99.0)
    assert not any(guard.admits(norm) for norm in (math.nan, math.inf, 1e9))
    restored = StepGuard(EXPLODED["adamw"])
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert vars(restored) == vars(guard)
    assert (restored.skipped, restored.in_a_row, restored.diverged) == (4, 3, False)
    assert not restored.admits(math.inf)
    assert not restored.admits(math.inf)
    assert restored.diverged
    still = StepGuard(EXPLODED["adamw"])
    assert all(still.admits(norm) for norm in [0.0] * 10 + [1e-9])


def test_a_step_of_equal_length_is_taken_however_large_the_gradient() -> None:
    guard = StepGuard(EXPLODED["sign_sgd"])
    assert all(guard.admits(norm) for norm in [1.0] * 20 + [1e9, 1e30])
    assert not guard.admits(math.nan)
    assert not guard.admits(math.inf)
