"""Which arithmetic the blocks run in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
"""Lightning's name of a precision → dtype of autocast, None for none."""


LOSS_SCALES = {"16-mixed": 2.0**16}
"""Precision → factor on a loss before its backward; 1 for the others.

A mean over thousands of tokens has gradients that float16 rounds to zero. As with PyTorch's GradScaler, this is what it
begins with, and an overflow halves it. No optimizer depends on it: one takes signs, the other divides by the gradient's
size.
"""


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the processor multiplies it natively (else it is emulated, and slower than float32)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # Emulated bfloat16 is several times slower than float32. There is no public question for native support.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast of `precision` on `device`; it is the same in training, in calibration and in evaluation.

    The modules autocast themselves, instead of Lightning's precision plugin, because DeepSpeed's would turn the
    quantizers' parameters into bfloat16 as well.
    """
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
