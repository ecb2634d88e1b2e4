"""Packed words → tiles of 16-bit floats `1 + q / 2**bits`, shared by all the kernels over the packed format.

A word of a plane holds in either half the bits of weights that are neighbours in memory order (see
`slimplus.format.planes`), so one shift and one AND-OR put two weights at once at the top of the mantissas of two
16-bit ones: no integer is ever converted to a float. Scale and zero point are left to the caller, in the same units:
`weight = (1 + q / 2**bits - (1 + zeros / 256)) * (scale * 2**bits)`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_words(plane, first_word, stride, row, inside, WORDS: tl.constexpr):
    """Words `[rows, WORDS]` of a plane from `first_word` on. They are read once, so the cache may drop them."""
    word = first_word + tl.arange(0, WORDS)
    pointers = plane + word[None, :] * stride + row[:, None]
    return tl.load(pointers, mask=inside[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def _fields(
    plane, first_word, stride, row, inside, PLANE: tl.constexpr, POSITION: tl.constexpr, CONTAINERS: tl.constexpr
):
    """`[rows, 8, CONTAINERS]`: a group's bits in one plane, those of two weights at POSITION of the halves of int32."""
    i = tl.arange(0, 8)
    words = _load_words(plane, first_word, stride, row, inside, CONTAINERS)
    if PLANE == 1:
        words = words.to(tl.uint16, bitcast=True).to(tl.int32)
        words |= words << 8  # the second half from bit 8 to bit 16
    PER_HALF: tl.constexpr = 8 if PLANE == 1 else 16 // PLANE
    words = words[:, None, :]
    for word_row in tl.static_range(1, 8 // PER_HALF):
        more = _load_words(plane, first_word + word_row * CONTAINERS, stride, row, inside, CONTAINERS)
        words = tl.where(i[None, :, None] < word_row * PER_HALF, words, more[:, None, :])
    shift = PLANE * (i % PER_HALF)
    return ((words >> shift[None, :, None]) << POSITION) & ((((1 << PLANE) - 1) << POSITION) * 0x10001)


@triton.jit
def unpack_group(
    plane1,
    plane2,
    plane4,
    plane8,
    first1,
    first2,
    first4,
    first8,
    stride,
    row,
    inside,
    ones,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    dtype: tl.constexpr,
):
    """One group of BITS bits → int32 `[rows, 8, GROUP_SIZE // 16]`, each two of `1 + q / 2**BITS` in dtype.

    Args:
        plane1, plane2, plane4, plane8: binary planes; one without bits of BITS is never read.
        first1, first2, first4, first8: the group's first word row in each plane.
        stride: words between word rows.
        row, inside: `[rows]`, rows of the weight and whether they exist.
        ones: two ones of dtype in an int32. A number of the launch, no constant of the kernel: as a constant it keeps
            the compiler from doing AND and OR in one instruction.
        dtype: float16, or bfloat16 for up to 7 bits.
    """
    CONTAINERS: tl.constexpr = GROUP_SIZE // 16
    LOWEST: tl.constexpr = (10 if dtype == tl.float16 else 7) - BITS
    pairs = ones
    # XOR and OR alternate, though no two fields share a bit: a chain of ORs would be regrouped and cost a third more.
    if BITS & 8:
        pairs |= _fields(plane8, first8, stride, row, inside, 8, LOWEST + (BITS & 7), CONTAINERS)
    if BITS & 4:
        pairs = _fields(plane4, first4, stride, row, inside, 4, LOWEST + (BITS & 3), CONTAINERS) ^ pairs
    if BITS & 2:
        pairs = _fields(plane2, first2, stride, row, inside, 2, LOWEST + (BITS & 1), CONTAINERS) ^ pairs
    if BITS & 1:
        pairs |= _fields(plane1, first1, stride, row, inside, 1, LOWEST, CONTAINERS)
    return pairs


@triton.jit
def load_exponents(scales, groups, stride, row, inside):
    """Of the rows of a weight with that many groups, as `load_scale` wants them; zeros for scales of 16 bits."""
    exponents = tl.zeros_like(row)
    if scales.dtype.element_ty == tl.uint8:
        exponents = tl.load(scales + groups * stride + row, mask=inside, other=0).to(tl.int32) << 5
    return exponents


@triton.jit
def load_scale(scales, exponents, group, stride, row, inside):
    """A group's scales `[rows]`, float32."""
    if scales.dtype.element_ty == tl.uint8:
        code = tl.load(scales + group * stride + row, mask=inside, other=0).to(tl.int32)
        return ((code + exponents) << 5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.load(scales + group * stride + row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def as_tile(pairs, dtype: tl.constexpr, PERMUTED: tl.constexpr = False):
    """Pairs of weights `[rows, 8, containers]` → the weights `[rows, columns]` in dtype, without an instruction.

    PERMUTED puts the columns in the order of `permute_for_mma`.
    """
    ROWS: tl.constexpr = pairs.shape[0]
    CONTAINERS: tl.constexpr = pairs.shape[2]
    if PERMUTED and CONTAINERS > 1:
        pairs = tl.permute(tl.reshape(pairs, (ROWS, 4, 2, CONTAINERS // 2, 2)), (0, 1, 4, 3, 2))
    first = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(first, second), (ROWS, CONTAINERS * 16))


@triton.jit
def permute_for_mma(values):
    """`[columns, tokens]` of a group's inputs in the order of columns that costs the tensor cores' operands the least.

    A thread takes four neighbours of this order at once, and four more 16 further on. Of the weights these come from
    one bit position of a word and the next, so that all threads shift alike; the inputs that go into one instruction
    are neighbours in memory, so that one load brings them to registers side by side.
    """
    COLUMNS: tl.constexpr = values.shape[0]
    TOKENS: tl.constexpr = values.shape[1]
    if COLUMNS > 16:
        values = tl.permute(tl.reshape(values, (4, 2, COLUMNS // 32, 2, 2, TOKENS)), (0, 3, 2, 1, 4, 5))
    return tl.reshape(values, (COLUMNS, TOKENS))
