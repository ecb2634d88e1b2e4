"""Hints to the system on which pages of memory-mapped weights to read ahead, and which to give up first."""

from __future__ import annotations

import ctypes
import mmap
import sys
from enum import IntEnum

from torch import nn


class Advice(IntEnum):
    """What is going to happen to memory, by Linux's numbers; neither changes what it holds (`man 2 madvise`)."""

    WILL_NEED = 3
    COLD = 20  # unlike 4, DONTNEED, which would zero weights that are in no file


def advise(module: nn.Module, advice: Advice) -> None:
    """Tell the system what is going to happen to the memory of a module's parameters.

    Systems other than Linux are told nothing, and an older one may refuse: results do not depend on it.

    Args:
        module: a module; parameters that are not in main memory are left out.
        advice: what is going to happen.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    for parameter in module.parameters():
        if parameter.device.type == "cpu":
            start = parameter.data_ptr()
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            length = start + parameter.nbytes - first
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(advice))
