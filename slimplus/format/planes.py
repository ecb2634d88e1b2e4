"""Binary planes: the packed format of a mixed-bit linear weight.

Groups are stored sorted by width. The bits of a group are divided among planes of 1, 2, 4 and 8 bits (3 = 2 + 1,
5 = 4 + 1), the most significant bits in the widest plane, so that nothing straddles a word and nothing is padded. With
G columns a group and J = G / 16, the bits of column `c = 2 J i + 2 j + h` (i < 8, j < J, h < 2) lie here; the last
dimension of a plane is the row of the weight:

| tensor | dtype, shape | place of the column |
|---|---|---|
| qplane1 | int16 `[n₁ J, rows]` | row `j`, bit `8 h + i` |
| qplane2 | int32 `[n₂ J, rows]` | row `j`, bits `16 h + 2 i` |
| qplane4 | int32 `[n₄ 2 J, rows]` | row `(i // 4) J + j`, bits `16 h + 4 (i % 4)` |
| qplane8 | int32 `[n₈ 4 J, rows]` | row `(i // 2) J + j`, bits `16 h + 8 (i % 2)` |

Beside the planes are stored

| tensor | dtype, shape | content |
|---|---|---|
| scales | float16 `[groups, rows]`, or uint8 `[groups + 1, rows]` | the uint8 ones end with a row of exponents |
| zeros | uint8 `[groups, rows]` | zero points, in fixed point with `8 - bits` fraction bits |
| group_index | int16 `[groups]` | original group at each stored position |
| group_bits | uint8 `[groups]` | width of each stored group |

`rows` is the number of output features rounded up to 16, and nᵦ the number of groups with bits in plane b. A plane
without groups is left out. The 8-bit scale `s` of a row with the exponent `e` is the float16 with the bits
`(s + 32 e) << 5`: a kernel decodes it with an addition and a shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from slimplus.format.affine import MAX_BITS, QuantizedWeight, decode_scales, encode_scales, group_count

PLANES = (1, 2, 4, 8)
ROW_MULTIPLE = 16
COLUMNS_PER_CONTAINER = 16

BitCounts = Mapping[int, int]
"""Number of groups of each width."""


def count_bits(bits: Tensor) -> dict[int, int]:
    """Count the groups of each width in `bits` `[groups]`."""
    widths, counts = torch.unique(bits.cpu(), return_counts=True)
    return dict(zip(widths.tolist(), counts.tolist(), strict=True))


def padded_rows(out_features: int) -> int:
    """Return the number of output features rounded up to 16, the rows of a tile of the tensor cores."""
    return -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE


def packed_shapes(
    out_features: int, counts: BitCounts, group_size: int, scale_bits: int = 16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of every tensor of a packed weight; its names do not depend on `scale_bits`."""
    groups, rows = sum(counts.values()), padded_rows(out_features)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for plane in PLANES:
        members = sum(count for width, count in counts.items() if width & plane)
        if members:
            words = members * _word_rows(plane) * (group_size // COLUMNS_PER_CONTAINER)
            shapes[f"qplane{plane}"] = ((words, rows), _container(plane))
    return shapes | {
        "scales": ((groups + 1, rows), torch.uint8) if scale_bits == 8 else ((groups, rows), torch.float16),
        "zeros": ((groups, rows), torch.uint8),
        "group_index": ((groups,), torch.int16),
        "group_bits": ((groups,), torch.uint8),
    }


def packed_size(out_features: int, counts: BitCounts, group_size: int, scale_bits: int = 16) -> int:
    """Return the size of all the tensors of a packed weight, in bytes."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for shape, dtype in packed_shapes(out_features, counts, group_size, scale_bits).values()
    )


def stored_scale_bits(packed: Mapping[str, Tensor]) -> int:
    """Return the number of bits that a scale takes in a packed weight."""
    return 8 * packed["scales"].dtype.itemsize


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of the packed format by name, on the CPU; they are computed on the device of `weight`.

    Raises:
        ValueError: if the group size is not a multiple of 16.
    """
    group_size = weight.group_size
    if group_size % COLUMNS_PER_CONTAINER:
        raise ValueError(f"group_size {group_size} cannot be packed: it must be a multiple of {COLUMNS_PER_CONTAINER}")
    out_features, in_features = weight.integers.shape
    bits = weight.bits.to(weight.integers.device)
    groups, rows = len(bits), padded_rows(out_features)
    order = torch.argsort(bits, stable=True)
    missing = (0, groups * group_size - in_features, 0, rows - out_features)
    columns = torch.nn.functional.pad(weight.integers, missing).T.contiguous()
    # [stored group, i, j, h, row], as in the module's docstring
    stored = columns.view(groups, 8, group_size // COLUMNS_PER_CONTAINER, 2, rows)[order]
    packed: dict[str, Tensor] = {}
    for plane in PLANES:
        parts = [
            pack_plane(stored[start:stop], plane, _offset(width, plane))
            for width, start, stop in segments(count_bits(bits))
            if width & plane
        ]
        if parts:
            packed[f"qplane{plane}"] = torch.cat(parts)
    packed |= pack_grid(weight.scale, weight.zero_point, bits, weight.scale_bits)
    packed["group_index"] = order.to(torch.int16)
    packed["group_bits"] = bits[order].to(torch.uint8)
    return {name: tensor.cpu().contiguous() for name, tensor in packed.items()}


def pack_grid(scale: Tensor, zero_point: Tensor, bits: Tensor, scale_bits: int) -> dict[str, Tensor]:
    """Return the packed tensors `scales` and `zeros`, on the device of the scales.

    Args:
        scale: scales that can be stored, `[out, groups]`.
        zero_point: zero points that can be stored, `[out, groups]`.
        bits: widths of the groups, `[groups]`, on the same device.
        scale_bits: bits of a scale.
    """
    rows, order = padded_rows(len(scale)), torch.argsort(bits, stable=True)
    steps = torch.exp2((MAX_BITS - bits).float())
    if scale_bits == 8:
        codes, exponents = encode_scales(scale)
        scales = torch.cat([_stored(codes, rows)[order], _stored(exponents, rows)])
    else:
        scales = _stored(scale, rows)[order].to(torch.float16)
    return {"scales": scales, "zeros": _stored(zero_point * steps, rows)[order].to(torch.uint8)}


def unpack(packed: Mapping[str, Tensor], out_features: int, in_features: int, group_size: int) -> QuantizedWeight:
    """Return the quantized weight that `pack` was given, on the device of the packed tensors.

    Args:
        packed: the tensors of the packed format by name.
        out_features: rows of the weight.
        in_features: columns of the weight.
        group_size: columns a group.
    """
    stored_bits, index = packed["group_bits"].int(), packed["group_index"].long()
    inverse = torch.argsort(index)
    bits = stored_bits[inverse]
    scales, scale_bits = packed["scales"], stored_scale_bits(packed)
    if scale_bits == 8:
        scales = decode_scales(scales[:-1], scales[-1:])
    scale = scales[inverse].T[:out_features].float()
    zero_point = packed["zeros"][inverse].T[:out_features].float() / torch.exp2((MAX_BITS - bits).float())
    integers = unpack_integers(packed, out_features, in_features, group_size)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size, scale_bits)


def unpack_integers(packed: Mapping[str, Tensor], out_features: int, in_features: int, group_size: int) -> Tensor:
    """Return the integers `[out, in]`, uint8, of the weight that `pack` was given.

    The arguments are those of `unpack`; of the packed tensors, `scales` and `zeros` are not needed.
    """
    stored_bits, index = packed["group_bits"].int(), packed["group_index"].long()
    groups, rows = len(index), padded_rows(out_features)
    shape = (8, group_size // COLUMNS_PER_CONTAINER, 2, rows)
    columns = torch.empty(groups, *shape, dtype=torch.uint8, device=index.device)
    taken = dict.fromkeys(PLANES, 0)
    for width, start, stop in segments(count_bits(stored_bits)):
        segment = torch.zeros(stop - start, *shape, dtype=torch.uint8, device=index.device)
        for plane in PLANES:
            if width & plane:
                first = taken[plane]
                taken[plane] += (stop - start) * _word_rows(plane) * shape[1]
                unpack_plane(packed[f"qplane{plane}"][first : taken[plane]], plane, _offset(width, plane), segment)
        columns[index[start:stop]] = segment
    return columns.view(groups * group_size, rows).T[:out_features, :in_features]


def segments(counts: BitCounts) -> Iterator[tuple[int, int, int]]:
    """Yield `(width, start, stop)` for the stored groups `start … stop - 1` of each width, in stored order."""
    start = 0
    for width in sorted(counts):
        yield width, start, start + counts[width]
        start += counts[width]


def check_features(in_features: int, counts: BitCounts, group_size: int) -> None:
    """Check that `counts` describes the groups of `in_features` columns.

    Raises:
        ValueError: if the number of groups differs, or a width lies outside 1 to 8.
    """
    expected = group_count(in_features, group_size)
    if sum(counts.values()) != expected or not all(1 <= width <= MAX_BITS for width in counts):
        raise ValueError(
            f"{dict(counts)} (groups by width) does not describe {expected} groups of 1 to {MAX_BITS} bits, which "
            f"{in_features} columns make"
        )


def _container(plane: int) -> torch.dtype:
    return torch.int16 if plane == 1 else torch.int32


def _columns_per_half(plane: int) -> int:
    return (8 if plane == 1 else 16) // plane


def _word_rows(plane: int) -> int:
    """Return the rows of words that a group takes in a plane, as a multiple of J."""
    return 8 // _columns_per_half(plane)


def _offset(width: int, plane: int) -> int:
    """Return the position of the plane's bits in an integer: the widest plane holds the most significant ones."""
    return sum(narrower for narrower in PLANES if narrower < plane and width & narrower)


def _bytes_per_half(plane: int) -> int:
    return 1 if plane == 1 else 2


def _split_columns(integers: Tensor, plane: int) -> Tensor:
    """View integers `[n, 8, J, 2, rows]`, uint8, as `[n, word rows, bytes a half, columns a byte, J, 2, rows / 8]`.

    An int64 of the view holds eight rows: a shift and a mask that stay inside each byte treat all eight at once.
    """
    return integers.view(torch.int64).unflatten(1, (_word_rows(plane), _bytes_per_half(plane), 8 // plane))


def _mask(plane: int) -> int:
    """Return the mask of the plane's bits at the lower end of each byte of an int64."""
    return int.from_bytes(bytes([2**plane - 1] * 8), "little", signed=True)


def pack_plane(integers: Tensor, plane: int, offset: int) -> Tensor:
    """Pack the plane's bits of integers `[n, 8, J, 2, rows]` into words `[n · word rows · J, rows]`.

    Args:
        integers: uint8.
        plane: bits of the plane.
        offset: position of the plane's lowest bit in the integers.
    """
    columns, mask = _split_columns(integers, plane), _mask(plane)
    packed = (columns[:, :, :, 0] >> offset) & mask
    for position in range(1, 8 // plane):
        packed |= ((columns[:, :, :, position] >> offset) & mask) << plane * position
    fields = packed.view(torch.uint8)
    words = torch.empty(*fields[:, :, 0, :, 0].shape, 2, fields.shape[2], dtype=torch.uint8, device=fields.device)
    for half in range(2):  # a single permuted copy would go four bytes at a time, which is ten times slower
        for byte in range(fields.shape[2]):
            words[..., half, byte] = fields[:, :, byte, :, half]
    return words.flatten(-2).view(_container(plane)).view(-1, integers.shape[-1])


def unpack_plane(words: Tensor, plane: int, offset: int, integers: Tensor) -> None:
    """Set the plane's bits of `integers` `[n, 8, J, 2, rows]` from the words that `pack_plane` made of them."""
    columns, mask = _split_columns(integers, plane), _mask(plane)
    shape = (len(integers), _word_rows(plane), integers.shape[2], -1, 2, _bytes_per_half(plane))
    packed = words.contiguous().view(torch.uint8).view(shape).permute(0, 1, 5, 2, 4, 3).contiguous().view(torch.int64)
    for position in range(8 // plane):
        columns[:, :, :, position] |= ((packed >> plane * position) & mask) << offset


def _stored(values: Tensor, rows: int) -> Tensor:
    """Transpose values `[out, groups]` to `[groups, rows]`, padded with zeros."""
    return torch.nn.functional.pad(values.T, (0, rows - values.shape[0]))
