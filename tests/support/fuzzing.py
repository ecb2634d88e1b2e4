"""What tests of hostile files share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        9,
        17,
        2**15,
        2**31,
        2**63,
        10**12,
        10**30,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "2", "2 ", "-1", "１", "x" * 1000, "../../etc/passwd", [], [1], [10**12, 10**12], [[[]]], {}, {"1": 10**9}),
)
"""What JSON may hold in the place of anything."""


def fuzz(examples: int) -> settings:
    """So many examples, each of which may be slow on a busy machine."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def refusal(check: Callable[[], object], kind: type[ValueError] = ValueError) -> str | None:
    """What a check says against its input; any error but a clear one, of that kind, is not caught."""
    try:
        check()
    except kind as error:
        return str(error)
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something can be replaced."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*path, key)
        yield from places(member, (*path, key))


def damaged(value: Any, choose: Callable[[Any], Any]) -> Any:
    """A copy of a JSON value with one thing removed, replaced or renamed."""
    copy = json.loads(json.dumps(value))
    *path, last = choose(list(places(copy)))
    parent = copy
    for key in path:
        parent = parent[key]
    action = choose(("replace", "replace", "replace", "remove", "rename"))
    if action == "remove":
        del parent[last]
    elif action == "rename" and isinstance(parent, dict):
        parent[choose(("x", "lm_head", "model.layers.0", "", "0"))] = parent.pop(last)
    else:
        parent[last] = choose(HOSTILE)
    return copy


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)
