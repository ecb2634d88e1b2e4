"""Progress bars: one for blocks, with the time left; Lightning draws the one for steps below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate with a bar that says `description: block i of N` and the time left, on the first rank only."""
    layout = "{desc}: block {n_fmt} of {total_fmt} |{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    yield from tqdm(
        items, description, bar_format=layout, dynamic_ncols=True, disable=getattr(rank_zero_only, "rank", 0) > 0
    )
