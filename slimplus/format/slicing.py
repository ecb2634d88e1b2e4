"""Rows and columns of a packed weight, cut out without computing its values, as tensor parallelism needs them.

Rows are the last dimension of every plane. Columns come in whole groups where the cut lies between groups. Where it
goes through one, each group becomes several smaller ones with the same scale, zero point and width: with k parts of a
group of G = 16 J columns, column `2 J i + 2 j + h` lies in part `m // 8` at `i' = m % 8`, `j' = j % (J / k)`, where
`m = k i + j // (J / k)`. The bits of a plane thus only change places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import torch
from torch import Tensor

from slimplus.format.planes import (
    COLUMNS_PER_CONTAINER,
    PLANES,
    pack_plane,
    padded_rows,
    stored_scale_bits,
    unpack_plane,
)


def slice_rows(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """Return a copy of one tensor of a packed weight that holds `rows` alone.

    Args:
        tensor: any tensor of the packed format, with the weight's rows in its last dimension if it has two.
        rows: rows of the weight, in the order in which they are to stand.
    """
    if tensor.dim() == 1:  # what tells the groups is the same for all rows
        return tensor.clone()
    count = sum(map(len, rows))
    sliced = tensor.new_zeros(len(tensor), padded_rows(count))
    start = 0
    for part in rows:
        sliced[:, start : start + len(part)] = tensor[:, part.start : part.stop]
        start += len(part)
    return sliced


def slice_columns(packed: Mapping[str, Tensor], group_size: int, columns: range) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of `columns` of a packed weight, and their group size.

    The group size is the greatest common divisor of that of the weight, the first column and their number.

    Args:
        packed: the tensors of the packed format by name.
        group_size: columns a group.
        columns: columns of the weight.

    Raises:
        ValueError: if the new group size is not a multiple of 16.
    """
    refined = gcd(group_size, columns.start, len(columns))
    if refined % COLUMNS_PER_CONTAINER:
        raise ValueError(
            f"columns {columns.start} to {columns.stop - 1} cut groups of {group_size} into parts of {refined}, "
            f"and a group needs a multiple of {COLUMNS_PER_CONTAINER}"
        )
    parts, count = group_size // refined, len(columns) // refined
    bits, index = packed["group_bits"], packed["group_index"].long()
    places = index[:, None] * parts + torch.arange(parts, device=index.device) - columns.start // refined
    kept = (places >= 0) & (places < count)  # [stored group, part]
    sliced: dict[str, Tensor] = {}
    for plane in PLANES:
        members = (bits & plane) != 0
        if kept[members].any():
            sliced[f"qplane{plane}"] = _slice_plane(packed[f"qplane{plane}"], plane, kept[members])
    rows = kept.nonzero()[:, 0]  # the stored group of each part
    scales = packed["scales"]
    exponents = [scales[-1:]] if stored_scale_bits(packed) == 8 else []
    sliced |= {
        "scales": torch.cat([scales[rows], *exponents]),
        "zeros": packed["zeros"][rows],
        "group_index": places[kept].to(torch.int16),
        "group_bits": bits[rows],
    }
    return sliced, refined


def _slice_plane(words: Tensor, plane: int, kept: Tensor) -> Tensor:
    """Return the words of the parts of groups that are kept.

    Args:
        words: the words of a plane, `[groups · words a group, rows]`.
        plane: bits of the plane.
        kept: whether each part is kept, `[groups, parts]`.
    """
    groups, parts = kept.shape
    touched = kept.any(dim=1)
    own = words.unflatten(0, (groups, -1))[touched]
    if parts == 1:
        return own.flatten(0, 1)
    columns_per_bit = own.shape[1] * words.dtype.itemsize * 8 // plane // 16  # J: a group has 16 J columns
    fields = torch.zeros(len(own), 8, columns_per_bit, 2, own.shape[-1], dtype=torch.uint8, device=words.device)
    unpack_plane(own.flatten(0, 1), plane, 0, fields)
    return pack_plane(fields.view(len(own), parts, 8, columns_per_bit // parts, 2, -1)[kept[touched]], plane, 0)
