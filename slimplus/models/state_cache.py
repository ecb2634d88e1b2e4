"""Hidden states of all windows: in main memory, and beyond a limit in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(eq=False)
class StateCache:
    """What gives tensors their memory.

    A file has no name once it is mapped, so that the system removes it with the last tensor that lies in it, however
    the process ends.

    Attributes:
        limit: bytes of main memory that its tensors may take together; None for no limit.
        folder: folder of the files; only needed with a limit.
        used: bytes of main memory that its tensors take.
    """

    limit: int | None = None
    folder: Path | None = None
    used: int = field(default=0, init=False)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU without values.

        Args:
            shape: shape of the tensor.
            dtype: dtype of the tensor.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        size = prod(shape) * dtype.itemsize
        if self.limit is None or not size:
            return torch.empty(*shape, dtype=dtype)
        if self.used + size > self.limit:
            return self._mapped(shape, dtype, size)
        self.used += size
        tensor = torch.empty(*shape, dtype=dtype)
        weakref.finalize(tensor, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.used -= size

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype, size: int) -> Tensor:
        """Return a tensor in a file that has no name."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(suffix=".states", dir=self.folder)
        try:
            # Here a full disk is an error; at the first write to a mapped page it would be a signal.
            os.posix_fallocate(descriptor, 0, size)
            return torch.from_file(path, shared=True, size=prod(shape), dtype=dtype).view(*shape)
        finally:
            os.close(descriptor)
            os.unlink(path)


IN_MEMORY = StateCache()
"""Cache without a limit."""
