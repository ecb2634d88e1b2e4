"""JSON that every reader takes: Python's own writer puts `NaN` and `Infinity`, which are no JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(content: object, indent: int | None = None) -> str:
    """Return content as JSON, with null in the place of NaN and infinity."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    """Return a copy of content without NaN and infinity."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
