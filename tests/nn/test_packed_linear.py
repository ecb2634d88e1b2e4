"""The packed layer."""

from __future__ import annotations

import pytest

from slimplus.nn import PackedLinear
from tests.support.blocks import GROUP_SIZE


def test_packed_layer_that_does_not_fit_its_columns() -> None:
    with pytest.raises(ValueError, match="does not describe 3 groups"):
        PackedLinear(96, 16, GROUP_SIZE, {2: 4})
