"""The order of the calibration windows in training, which is the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from slimplus.distributed.ranks import Ranks


class StepSampler(Sampler[int]):
    """Sampler of this rank's windows, numbered within its share, in the order in which the steps of an epoch use them.

    Window `i` of the job lies on rank `i % ranks` and in slot `i % batch_size`. Each step takes one window of every
    slot, in an order drawn anew for each epoch. If the number of ranks divides the batch size, a slot lies on one rank,
    so that the windows of a step depend on the seed and the epoch only. A resumed epoch uses the same windows.

    Args:
        windows: number of windows of the whole job, a multiple of `batch_size`.
        batch_size: number of windows per step on all ranks together, a multiple of the number of ranks.
        ranks: the processes of the job.
        seed: seed of the order.
    """

    def __init__(self, windows: int, batch_size: int, ranks: Ranks, seed: int) -> None:
        self.steps, self.epoch = windows // batch_size, 0
        self.batch_size, self.ranks, self.seed = batch_size, ranks, seed

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batch_size // self.ranks.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        places = torch.stack([torch.randperm(self.steps, generator=generator) for _ in range(self.batch_size)], dim=1)
        windows = places * self.batch_size + torch.arange(self.batch_size)
        own = windows[:, self.ranks.rank :: self.ranks.count] // self.ranks.count
        yield from own.flatten().tolist()
