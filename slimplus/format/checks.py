"""Checks of a packed weight before anything computes with it, since kernels trust its indices and sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimplus.format.affine import LARGEST_EXPONENT, MAX_BITS, group_count
from slimplus.format.planes import BitCounts, check_features, count_bits, packed_shapes, stored_scale_bits

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
LARGEST_SIZE = 2**31 - 1
LARGEST_GROUP_COUNT = 2**15 - 1  # group_index is int16


def check_layout(shape: tuple[int, int], counts: BitCounts, group_size: int) -> None:
    """Check that a weight of `shape` `[out, in]` can have `counts` groups of each width.

    The check allocates nothing, however large the numbers are.

    Raises:
        ValueError: if it cannot.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, not one of {', '.join(map(str, GROUP_SIZES))}")
    if not all(1 <= size <= LARGEST_SIZE for size in shape):
        raise ValueError(f"a weight of {shape[0]} x {shape[1]} has a size outside 1 to {LARGEST_SIZE}")
    if group_count(shape[1], group_size) > LARGEST_GROUP_COUNT:
        raise ValueError(f"{shape[1]} columns in groups of {group_size} are more than {LARGEST_GROUP_COUNT} groups")
    if not all(count >= 1 for count in counts.values()):
        raise ValueError(f"{dict(counts)} (groups by width) holds a count that is not positive")
    check_features(shape[1], counts, group_size)


def check_packed(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], group_size: int, counts: BitCounts | None = None
) -> None:
    """Check the tensors of a packed weight, on any device.

    Args:
        tensors: the tensors by their names in the format; others, such as a bias, are ignored.
        shape: shape of the weight, `[out, in]`.
        group_size: columns a group.
        counts: number of groups of each width; None takes it from `group_bits`.

    Raises:
        ValueError: naming the tensor, if one is missing, has another shape or dtype, or holds what the format excludes:
            widths that are unsorted or outside 1 to 8, a `group_index` that is not a permutation, scales that are
            negative or not finite, exponents that make scales infinite. Planes and zero points may hold anything.
    """
    try:
        counts = _counts(tensors) if counts is None else counts
        check_layout(shape, counts, group_size)
    except ValueError as error:
        raise ValueError(f"group_bits: {error}") from error
    if "scales" not in tensors:
        raise ValueError("scales is missing")
    scale_bits = stored_scale_bits(tensors)
    for name, (expected, dtype) in packed_shapes(shape[0], counts, group_size, scale_bits).items():
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        tensor = tensors[name]
        if tuple(tensor.shape) != expected or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(expected)}")
    widths = tensors["group_bits"].tolist()
    if widths != sorted(width for width, count in counts.items() for _ in range(count)):
        raise ValueError(f"group_bits does not hold the widths {dict(sorted(counts.items()))} in rising order")
    if sorted(tensors["group_index"].tolist()) != list(range(len(widths))):
        raise ValueError(f"group_index is not a permutation of {len(widths)} groups")
    scales = tensors["scales"]
    if scale_bits == 8 and (scales[-1] > LARGEST_EXPONENT).any():
        raise ValueError(f"scales holds exponents above {LARGEST_EXPONENT}")
    if scale_bits == 16 and not (torch.isfinite(scales) & (scales >= 0)).all():
        raise ValueError("scales holds values that are negative or not finite")


def _counts(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Return the number of groups of each width by `group_bits`."""
    if "group_bits" not in tensors:
        raise ValueError("missing")
    bits = tensors["group_bits"]
    if bits.dtype != torch.uint8 or bits.dim() != 1:
        raise ValueError(f"{bits.dtype} {list(bits.shape)} instead of {torch.uint8} [groups]")
    counts = count_bits(bits)
    if not all(1 <= width <= MAX_BITS for width in counts):
        raise ValueError(f"widths outside 1 to {MAX_BITS}")
    return counts
