"""Changed models: taken as transformers loads them, or refused in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.source_fuzzing import campaign

EXAMPLES = int(os.environ.get("SLIMPLUS_FUZZ_SOURCES", "25"))


@pytest.mark.parametrize("model_type", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_changed_models(tmp_path: Path, model_type: str) -> None:
    done = campaign(tmp_path, EXAMPLES, model_type)
    assert done.outcomes["taken"] > EXAMPLES // 20
    assert done.outcomes["refused"] > EXAMPLES // 5
