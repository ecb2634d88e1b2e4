"""The floating-point precision that blocks run in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from slimplus.quantization.salience import NotFiniteError

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
"""Lightning's name of a precision → dtype that autocast uses; None turns autocast off."""

LOSS_SCALES = {"16-mixed": 2.0**16}
"""Lightning's name of a precision → factor on a loss before its backward; 1 for the others.

The gradients of a mean over thousands of tokens are so small that float16 rounds them to zero. As in PyTorch's
GradScaler, the factor is a first value, and each overflow halves it. No optimizer depends on the factor: SignSGD takes
signs, and AdamW divides by the gradient's size.
"""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return `precision`, with `auto` resolved to what `device` multiplies natively.

    Args:
        precision: Lightning's name of a precision, or `auto`.
        device: where blocks run.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # Emulated bfloat16 is several times slower than float32. PyTorch has no public function that tells native support.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def with_remedy(error: ValueError, precision: str) -> str:
    """Return an error's message, with what to try if activations overflowed.

    Args:
        error: the error.
        precision: Lightning's name of the job's precision.
    """
    return f"{error}; {overflow_remedy(precision)}" if isinstance(error, NotFiniteError) else str(error)


def overflow_remedy(precision: str) -> str:
    """Return what to try where activations became NaN or infinity, given Lightning's name of the job's precision."""
    if precision == "32-true":
        return "float32 does not hold them, so the weights or config.json are wrong: download the model again"
    return "try trainer.precision=32-true"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context of a precision on a device, for training, calibration and evaluation alike.

    Modules enter it themselves instead of using Lightning's precision plugin: DeepSpeed's plugin would turn the
    quantizers' parameters into bfloat16 as well.
    """
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
