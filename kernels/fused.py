"""Packed layers that read the same input, laid end to end for one launch of `packed_matmul`."""

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

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
WIDEST = 4  # width that is multiplied for any number of tokens; wider groups are only decoded
GROUP_SIZES = (16, 32, 64, 128, 256)
PLANES = ("qplane1", "qplane2", "qplane4", "qplane8")
TABLE_ENTRIES = 32
FUSED = (*PLANES, "scales", "zeros", "group_index", "layer_table")
"""Names of a launch's tensors, in the order in which the kernel takes them."""

ONES = {torch.float16: 0x3C003C00, torch.bfloat16: 0x3F803F80}  # the bits of two ones in an int32
_PLANE_DTYPES = {name: torch.int16 if name == "qplane1" else torch.int32 for name in PLANES}
_PARTS = (*PLANES, "scales", "zeros", "group_index")  # tensors of each layer that a launch reads


@dataclass(frozen=True)
class FusedShape:
    """The shape of fused layers, which a launch knows without reading the device's memory.

    Attributes:
        in_features: columns of every layer.
        group_size: columns a group.
        out_features: rows of each layer.
        widths: widths that occur in any layer, ascending.
    """

    in_features: int
    group_size: int
    out_features: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Columns of the output: the rows of all the layers."""
        return sum(self.out_features)

    @property
    def padded_columns(self) -> int:
        """Columns of the partial sums: the rows of each layer, padded to a multiple of 16."""
        return sum(padded_rows(rows) for rows in self.out_features)

    @property
    def counters(self) -> int:
        """Number of counters that a launch needs at most, one for each block of its output.

        They suffice for blocks of 32 rows and 32 tokens, and for blocks of 16 rows if there is one block of tokens.
        """
        return sum(padded_rows(rows) // 4 + 8 for rows in self.out_features)


def fuse_layers(
    tensors: Sequence[Mapping[str, Tensor]],
    bit_counts: Sequence[BitCounts],
    out_features: Sequence[int],
    in_features: int,
    group_size: int,
) -> tuple[dict[str, Tensor], FusedShape]:
    """Lay packed layers that read the same input end to end.

    Args:
        tensors: packed tensors of each layer by name.
        bit_counts: number of groups of each width in each layer.
        out_features: rows of each layer.
        in_features: columns of every layer.
        group_size: columns a group.

    Returns:
        The flat tensors by the names of `FUSED`, and the shape of the launch. The tensors of each layer stay unchanged
        and in one piece, of which `split_layers` returns views; a single layer is not copied. The row of each layer in
        `layer_table` `[layers, 32]` says where they lie.

    Raises:
        ValueError: for a group size that is not a power of two from 16 to 256, counts that do not describe
            `in_features` columns, or scales of 8 bits in one layer and of 16 bits in another.
    """
    for counts in bit_counts:
        check_features(in_features, counts, group_size)
        if group_size not in GROUP_SIZES:
            raise ValueError(
                f"no kernel for groups of {group_size} columns; there are kernels for groups of "
                f"{', '.join(map(str, GROUP_SIZES))} columns"
            )
    first = tensors[0]["scales"]
    if any(layer["scales"].dtype != first.dtype for layer in tensors):
        raise ValueError("layers with scales of 8 bits and of 16 bits cannot be multiplied in one launch")
    fused = {
        name: _end_to_end([layer[name] for layer in tensors if name in layer], _PLANE_DTYPES.get(name), first.device)
        for name in _PARTS
    }
    table = _layer_table(bit_counts, out_features, group_size, stored_scale_bits(tensors[0]))
    fused["layer_table"] = torch.tensor(table, dtype=torch.int32).to(first.device)
    widths = tuple(width for width in WIDTHS if any(counts.get(width) for counts in bit_counts))
    return fused, FusedShape(in_features, group_size, tuple(out_features), widths)


def split_layers(
    fused: Mapping[str, Tensor], bit_counts: Sequence[BitCounts], out_features: Sequence[int], group_size: int
) -> list[dict[str, Tensor]]:
    """Return views of each layer's tensors in fused ones, by name; without `group_bits`, which no kernel reads.

    Args:
        fused: tensors that `fuse_layers` returned.
        bit_counts: number of groups of each width in each layer.
        out_features: rows of each layer.
        group_size: columns a group.
    """
    taken = dict.fromkeys(_PARTS, 0)
    layers = []
    for counts, rows in zip(bit_counts, out_features, strict=True):
        layer = {}
        for name, (shape, _) in packed_shapes(rows, counts, group_size, stored_scale_bits(fused)).items():
            if name in _PARTS:
                size = torch.Size(shape).numel()
                layer[name] = fused[name][taken[name] : taken[name] + size].view(shape)
                taken[name] += size
        layers.append(layer)
    return layers


def _end_to_end(parts: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Flatten and concatenate tensors; a single one is not copied."""
    if not parts:
        return torch.empty(0, dtype=dtype, device=device)
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _layer_table(
    bit_counts: Sequence[BitCounts], out_features: Sequence[int], group_size: int, scale_bits: int
) -> list[list[int]]:
    """Return the row of each layer, `[layers, 32]`, that `packed_matmul_kernel` reads.

    | entry | content |
    |---|---|
    | 0 | padded rows, in units of 16 |
    | 1 | rows |
    | 2 | first column of the layer in the output |
    | 3-7 | starts in qplane1, qplane2, qplane4, qplane8 and scales, in units of 16 elements |
    | 8 | start in group_index |
    | 9, 10 | the bits of two ones in float16, and in bfloat16 |
    | 11 | first column of the layer in the partial sums, in units of 16 |
    | 12 | start in zeros, in units of 16 elements |
    | 16-23 | stored groups of up to 1, 2, … and 8 bits |

    Units of 16 let the compiler prove that addresses are aligned.
    """
    offsets = dict.fromkeys((*PLANES, "scales", "zeros"), 0)
    table, first_output, first_group, first_padded = [], 0, 0, 0
    for counts, rows in zip(bit_counts, out_features, strict=True):
        stops = list(accumulate(counts.get(width, 0) for width in WIDTHS))
        *sixteenths, zeros = [offset // ROW_MULTIPLE for offset in offsets.values()]
        row = [padded_rows(rows) // ROW_MULTIPLE, rows, first_output, *sixteenths, first_group, *ONES.values()]
        row += [first_padded, zeros]
        table.append([*row, *[0] * (16 - len(row)), *stops, *[0] * (TABLE_ENTRIES - 16 - len(stops))])
        for name, (shape, _) in packed_shapes(rows, counts, group_size, scale_bits).items():
            if name in offsets:
                offsets[name] += torch.Size(shape).numel()
        first_output += rows
        first_padded += padded_rows(rows) // ROW_MULTIPLE
        first_group += stops[-1]
    return table
