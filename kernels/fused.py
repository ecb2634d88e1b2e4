"""Packed weights that read the same input, laid end to end for one launch of `packed_matmul`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from slimplus.format.planes import (
    ROW_MULTIPLE,
    BitCounts,
    check_features,
    packed_shapes,
    padded_rows,
    stored_scale_bits,
)

WIDTHS = (1, 2, 3, 4)
GROUP_SIZES = (16, 32, 64, 128, 256)
PLANES = ("qplane1", "qplane2", "qplane4")
FUSED = (*PLANES, "scales", "zeros", "group_index", "shard_table")
"""Tensors of a launch, in the order in which the kernel takes them."""

ONES = {torch.float16: 0x3C003C00, torch.bfloat16: 0x3F803F80}  # two of them in an int32
_PLANE_DTYPES = {"qplane1": torch.int16, "qplane2": torch.int32, "qplane4": torch.int32}
_PARTS = (*PLANES, "scales", "zeros", "group_index")


@dataclass(frozen=True)
class FusedShape:
    """What a launch must know of its weights without asking the device.

    Attributes:
        in_features: columns of every weight.
        group_size: columns a group.
        out_features: rows of each weight.
        widths: those that occur in any weight, ascending.
    """

    in_features: int
    group_size: int
    out_features: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Columns of the output."""
        return sum(self.out_features)

    @property
    def padded_columns(self) -> int:
        """Columns of the partial sums: every weight's rows are padded to 16."""
        return sum(padded_rows(rows) for rows in self.out_features)

    @property
    def counters(self) -> int:
        """Length of the int32 buffer in which programs count who came last: zeros before every launch and after it.

        It holds blocks of 32 rows and 32 tokens, or of 16 rows where there is one block of tokens.
        """
        return sum(padded_rows(rows) // 4 + 8 for rows in self.out_features)


def can_multiply(bit_counts: BitCounts, group_size: int) -> bool:
    """Whether the kernels handle a weight of these widths; all others are dequantized first."""
    return group_size in GROUP_SIZES and max(bit_counts) <= max(WIDTHS)


def fuse_shards(
    tensors: Sequence[Mapping[str, Tensor]],
    bit_counts: Sequence[BitCounts],
    out_features: Sequence[int],
    in_features: int,
    group_size: int,
) -> tuple[dict[str, Tensor], FusedShape]:
    """Lay packed weights that read the same input end to end.

    Returns:
        Flat tensors, those of each weight unchanged and in one piece (`split_shards` gives them back as views; a single
        weight is not copied), with `shard_table` `[weights, 16]` that says where; and the shape of the launch.

    Raises:
        ValueError: for widths above 4 bits, group sizes that are no power of two from 16 to 256, counts that do not
            describe `in_features` columns, or weights with scales of 8 and of 16 bits.
    """
    for counts in bit_counts:
        check_features(in_features, counts, group_size)
        if not can_multiply(counts, group_size):
            raise ValueError(f"no kernel for groups of {group_size} columns with {dict(counts)} groups of each width")
    first = tensors[0]["scales"]
    if any(shard["scales"].dtype != first.dtype for shard in tensors):
        raise ValueError("weights with scales of 8 and of 16 bits cannot be multiplied in one launch")
    fused = {
        name: _end_to_end([shard[name] for shard in tensors if name in shard], _PLANE_DTYPES.get(name), first.device)
        for name in _PARTS
    }
    table = _shard_table(bit_counts, out_features, group_size, stored_scale_bits(tensors[0]))
    fused["shard_table"] = torch.tensor(table, dtype=torch.int32).to(first.device)
    widths = tuple(width for width in WIDTHS if any(counts.get(width) for counts in bit_counts))
    return fused, FusedShape(in_features, group_size, tuple(out_features), widths)


def split_shards(
    fused: Mapping[str, Tensor], bit_counts: Sequence[BitCounts], out_features: Sequence[int], group_size: int
) -> list[dict[str, Tensor]]:
    """The tensors of each weight as views of the fused ones, all but `group_bits`, which no kernel reads."""
    taken = dict.fromkeys(_PARTS, 0)
    shards = []
    for counts, rows in zip(bit_counts, out_features, strict=True):
        shard = {}
        for name, (shape, _) in packed_shapes(rows, counts, group_size, stored_scale_bits(fused)).items():
            if name in _PARTS:
                size = torch.Size(shape).numel()
                shard[name] = fused[name][taken[name] : taken[name] + size].view(shape)
                taken[name] += size
        shards.append(shard)
    return shards


def _end_to_end(parts: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=dtype, device=device)
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _shard_table(
    bit_counts: Sequence[BitCounts], out_features: Sequence[int], group_size: int, scale_bits: int
) -> list[list[int]]:
    """A row for each shard, read by `packed_matmul_kernel`. Elements are counted in 16s, so that the compiler knows."""
    offsets = dict.fromkeys((*PLANES, "scales", "zeros"), 0)
    table, first_output, first_group, first_padded = [], 0, 0, 0
    for counts, rows in zip(bit_counts, out_features, strict=True):
        stops = list(accumulate(counts.get(width, 0) for width in WIDTHS))
        *sixteenths, zeros = [offset // ROW_MULTIPLE for offset in offsets.values()]
        row = [padded_rows(rows) // ROW_MULTIPLE, rows, first_output, *sixteenths, first_group, *stops, *ONES.values()]
        table.append([*row, first_padded, zeros])
        for name, (shape, _) in packed_shapes(rows, counts, group_size, scale_bits).items():
            if name in offsets:
                offsets[name] += torch.Size(shape).numel()
        first_output += rows
        first_padded += padded_rows(rows) // ROW_MULTIPLE
        first_group += stops[-1]
    return table
