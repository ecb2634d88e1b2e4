"""The progress bar over the blocks of a model; Lightning draws its own bar for training steps below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate over `items` behind a progress bar with the time left; only the first rank draws it."""
    layout = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    yield from tqdm(
        items, description, bar_format=layout, dynamic_ncols=True, disable=getattr(rank_zero_only, "rank", 0) > 0
    )
