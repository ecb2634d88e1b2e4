"""Which steps of a training are taken."""

from __future__ import annotations

import json
import math

from slimplus.training.step_guard import StepGuard


def test_which_gradients_are_admitted() -> None:
    guard = StepGuard()
    assert all(guard.admits(norm) for norm in (1e6, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0))  # too few to tell
    assert guard.admits(3.0)
    assert not guard.admits(101.0)
    assert guard.admits(99.0)
    assert not any(guard.admits(norm) for norm in (math.nan, math.inf, 1e9))
    restored = StepGuard()
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert vars(restored) == vars(guard)
    assert (restored.skipped, restored.in_a_row, restored.diverged) == (4, 3, False)
    assert not restored.admits(math.inf)
    assert not restored.admits(math.inf)
    assert restored.diverged
    still = StepGuard()
    assert all(still.admits(norm) for norm in [0.0] * 10 + [1e-9])
