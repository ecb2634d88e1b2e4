"""benchmarks/architectures.py: the table of the documentation is that of the measured rows."""

from __future__ import annotations

import json

import pytest

from benchmarks.architectures import PAGE, RESULTS, row, table

ROWS = json.loads(RESULTS.read_text())["rows"]


def test_the_table_is_made_from_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(ROWS)
    assert all(found["machine"]["commit"] and found["machine"]["transformers"] for found in ROWS)


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [("gpt2", "yes"), ("musicgen", "no: its default configuration builds no model (AttributeError: ")],
)
def test_a_row_says_what_the_self_check_says(model_type: str, outcome: str) -> None:
    found = row(model_type)
    (known,) = (known for known in ROWS if known["model_type"] == model_type)
    assert found["outcome"].startswith(outcome)
    assert known["outcome"] == found["outcome"]
