"""JSON for every reader."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimplus.utils.json_text import to_json


def _no_number(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def test_what_is_no_number_is_null() -> None:
    content: dict[str, Any] = {"a": [float("nan"), 1.5, (float("inf"), {"b": -float("inf")})], "c": 2, "d": "NaN"}
    read = json.loads(to_json(content), parse_constant=_no_number)
    assert read == {"a": [None, 1.5, [None, {"b": None}]], "c": 2, "d": "NaN"}


@pytest.mark.parametrize("content", [{"a": 0.1, "b": [1, 2]}, ["é"], None])
def test_anything_else_is_as_python_writes_it(content: object) -> None:
    assert to_json(content, indent=2) == json.dumps(content, indent=2)
