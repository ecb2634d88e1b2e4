"""A run with every stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import TUNED, Arguments
from tests.support.runs import run


@pytest.fixture(scope="session")
def tuned(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with every stage; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("tuned")
    run(arguments(folder, *TUNED, "quantization.allocation=model"))
    return folder
