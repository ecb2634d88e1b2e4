"""benchmarks/distributed.py: what it measures can be shared by its processes."""

from __future__ import annotations

import pytest

from benchmarks import distributed as scaling
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_shares


@pytest.mark.parametrize("processes", [1, 2])
def test_the_benchmarks_windows_can_be_shared(processes: int) -> None:
    keys = scaling.measured_keys("ddp", processes, 10, [scaling.RECIPE, *scaling.METHOD])
    check_shares(load_recipe(keys), processes)
