"""The order of the calibration windows in training: every step takes the same windows on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from slimplus.distributed.ranks import Ranks


class StepSampler(Sampler[int]):
    """This rank's windows, by their place in its share, in the order in which the steps of an epoch take them.

    Window `i` of the job lies on rank `i % ranks` and in slot `i % batch_size`. A step takes one window of each slot,
    at random and anew in each epoch; so ranks that divide the batch size hold whole slots, and which windows meet in a
    step depends on the seed and the epoch alone. A resumed epoch, too, sees the same windows.

    Args:
        windows: of the whole job, a multiple of `batch_size`.
        batch_size: windows a step, of all ranks together; a multiple of their number.
        ranks: the processes of the job.
        seed: of the order.
    """

    def __init__(self, windows: int, batch_size: int, ranks: Ranks, seed: int) -> None:
        self.steps, self.epoch = windows // batch_size, 0
        self.batch_size, self.ranks, self.seed = batch_size, ranks, seed

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batch_size // self.ranks.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        places = torch.stack([torch.randperm(self.steps, generator=generator) for _ in range(self.batch_size)], dim=1)
        windows = places * self.batch_size + torch.arange(self.batch_size)
        own = windows[:, self.ranks.rank :: self.ranks.count] // self.ranks.count
        yield from own.flatten().tolist()
