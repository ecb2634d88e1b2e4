"""The floating-point precision that blocks run in."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch

from slimplus.quantization.salience import NotFiniteError
from slimplus.utils.cpu_speed import product_seconds

logger = logging.getLogger(__name__)

FASTER = 1.5  # times that bfloat16 must be faster than float32 to be worth its rounding; native, it is 3 to 7 times

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
"""Lightning's name of a precision → dtype that autocast uses; None turns autocast off."""

LOSS_SCALES = {"16-mixed": 2.0**16}
"""Lightning's name of a precision → factor on a loss before its backward; 1 for the others.

The gradients of a mean over thousands of tokens are so small that float16 rounds them to zero. As in PyTorch's
GradScaler, the factor is a first value, and each overflow halves it. No optimizer depends on the factor: SignSGD takes
signs, and AdamW divides by the gradient's size.
"""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return `precision`, with `auto` resolved to what `device` multiplies fastest.

    On a CPU that is measured: it takes milliseconds.

    Args:
        precision: Lightning's name of a precision, or `auto`.
        device: where blocks run.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    full, half = (1000 * product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    resolved = "bf16-mixed" if FASTER * half < full else "32-true"
    logger.info(
        "trainer.precision=auto: %s; a thread takes %.2f ms for a product in float32, %.2f in bfloat16",
        resolved,
        full,
        half,
    )
    return resolved


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
