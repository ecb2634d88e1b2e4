"""Unpacking of words into tiles of 16-bit floats `1 + q / 2**bits`, shared by the kernels over the packed format.

The halves of a plane's word hold the bits of two neighbouring columns (see `slimplus.format.planes`). One shift and one
AND-OR thus write both integers into the top mantissa bits of two 16-bit ones: no integer is converted to a float. The
caller applies zero point and scale in the same units:
`weight = (1 + q / 2**bits - (1 + zeros / 256)) * (scale * 2**bits)`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_words(plane, first_word, stride, row, inside, WORDS: tl.constexpr):
    """Load words `[rows, WORDS]` of a plane from `first_word` on; the cache may drop them, since they are read once."""
    word = first_word + tl.arange(0, WORDS)
    pointers = plane + word[None, :] * stride + row[:, None]
    return tl.load(pointers, mask=inside[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def _fields(
    plane, first_word, stride, row, inside, PLANE: tl.constexpr, POSITION: tl.constexpr, CONTAINERS: tl.constexpr
):
    """Return a group's bits in one plane, `[rows, 8, CONTAINERS]`, int32: those of two weights from bit POSITION up.

    One weight lies in the lower half of the int32, its neighbour in the upper half.
    """
    i = tl.arange(0, 8)
    words = _load_words(plane, first_word, stride, row, inside, CONTAINERS)
    if PLANE == 1:
        words = words.to(tl.uint16, bitcast=True).to(tl.int32)
        words |= words << 8  # the second weight moves from bit 8 to bit 16
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
    """Unpack one group of BITS bits: int32 `[rows, 8, GROUP_SIZE // 16]`, each a pair of `1 + q / 2**BITS` in dtype.

    Args:
        plane1: plane of 1 bit; a plane that BITS does not use is never read.
        plane2: plane of 2 bits.
        plane4: plane of 4 bits.
        plane8: plane of 8 bits.
        first1: first row of the group's words in the plane of 1 bit.
        first2: first row of the group's words in the plane of 2 bits.
        first4: first row of the group's words in the plane of 4 bits.
        first8: first row of the group's words in the plane of 8 bits.
        stride: words from one row of a plane to the next.
        row: rows of the weight, `[rows]`.
        inside: mask of the rows that exist, `[rows]`.
        ones: two ones of dtype in an int32. It is an argument of the launch because as a constant of the kernel it
            keeps the compiler from doing AND and OR in one instruction.
        BITS: width of the group, 1 to 8.
        GROUP_SIZE: columns a group.
        dtype: float16, or bfloat16 for up to 7 bits.
    """
    CONTAINERS: tl.constexpr = GROUP_SIZE // 16
    LOWEST: tl.constexpr = (10 if dtype == tl.float16 else 7) - BITS
    pairs = ones
    # No two fields share a bit, so that XOR and OR do the same. They alternate because the compiler regroups a chain of
    # ORs, which then costs a third more.
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
def load_digit_words(plane, first_word, stride, row, inside, PLANE: tl.constexpr, CONTAINERS: tl.constexpr):
    """Load a group's words of one plane for `unpack_digits`: int32 `[rows, 8, CONTAINERS]`, one for each pair.

    Args:
        plane: the plane.
        first_word: first row of the group's words in it.
        stride: words from one row of the plane to the next.
        row: rows of the weight, `[rows]`.
        inside: mask of the rows that exist, `[rows]`.
        PLANE: bits of the plane, 1, 2, 4 or 8.
        CONTAINERS: sixteenths of the group's columns.
    """
    i = tl.arange(0, 8)
    words = _load_words(plane, first_word, stride, row, inside, CONTAINERS)
    if PLANE == 1:
        words = words.to(tl.uint16, bitcast=True).to(tl.int32)
        words |= words << 8
    PER_HALF: tl.constexpr = 8 if PLANE == 1 else 16 // PLANE
    words = words[:, None, :]
    for word_row in tl.static_range(1, 8 // PER_HALF):
        more = _load_words(plane, first_word + word_row * CONTAINERS, stride, row, inside, CONTAINERS)
        words = tl.where(i[None, :, None] < word_row * PER_HALF, words, more[:, None, :])
    return words


@triton.jit
def unpack_digits(words, ones, PLANE: tl.constexpr, LOWEST: tl.constexpr, HIGH: tl.constexpr):
    """Unpack a group's digits in one plane where they lie: bfloat16 `base + digit * 2**LOWEST`, pairs in an int32.

    A digit is what a plane holds of an integer, or half of that in the plane of 8 bits. Most digits lie within the 7
    bits of a mantissa as they are, and a base whose exponent suits their position makes them integers without a shift,
    which saves a third of the instructions.

    Args:
        words: words of the plane, from `load_digit_words`.
        ones: two bfloat16 ones in an int32, an argument of the launch as in `unpack_group`.
        PLANE: bits of the plane, 1, 2, 4 or 8.
        LOWEST: place of the digit's lowest bit in the integer.
        HIGH: for the plane of 8 bits, whether the upper half of its bits is wanted.

    Returns:
        int32 `[rows, 8, CONTAINERS]`.
    """
    i = tl.arange(0, 8)
    PER_HALF: tl.constexpr = 8 if PLANE == 1 else 16 // PLANE
    DIGIT: tl.constexpr = 4 if PLANE == 8 else PLANE
    UNSHIFTED: tl.constexpr = 7 // DIGIT  # digits within a mantissa
    place = i % PER_HALF
    shift = place * PLANE + HIGH * DIGIT if PLANE >= 4 else place // UNSHIFTED * (UNSHIFTED * DIGIT)
    mask = (((1 << DIGIT) - 1) << _digit_position(i, PLANE)) * 0x10001
    return ((words >> shift[None, :, None]) & mask[None, :, None]) | digit_bases(ones, PLANE, LOWEST)[None, :, None]


@triton.jit
def digit_bases(ones, PLANE: tl.constexpr, LOWEST: tl.constexpr):
    """Return the bases that `unpack_digits` adds to digits, `[8]`: pairs of equal powers of two in an int32."""
    return ones + ((7 + LOWEST - _digit_position(tl.arange(0, 8), PLANE)) << 7) * 0x10001


@triton.jit
def _digit_position(i, PLANE: tl.constexpr):
    """Return the position in their mantissas of the digits of the columns `2 J i + …` (`slimplus.format.planes`)."""
    return i % 7 if PLANE == 1 else i % 3 * 2 if PLANE == 2 else i * 0


@triton.jit
def load_exponents(scales, groups, stride, row, inside):
    """Load the rows' exponents of 8-bit scales, `[rows]`, shifted for `load_scale`; zeros for scales of 16 bits.

    `groups` is the number of groups of the weight: the exponents follow the scales of the last one.
    """
    exponents = tl.zeros_like(row)
    if scales.dtype.element_ty == tl.uint8:
        exponents = tl.load(scales + groups * stride + row, mask=inside, other=0).to(tl.int32) << 5
    return exponents


@triton.jit
def load_scale(scales, exponents, group, stride, row, inside):
    """Load the scales of a group, `[rows]`, float32; `exponents` are those of `load_exponents`."""
    if scales.dtype.element_ty == tl.uint8:
        code = tl.load(scales + group * stride + row, mask=inside, other=0).to(tl.int32)
        return ((code + exponents) << 5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.load(scales + group * stride + row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_zero(zeros, row, inside):
    """Load the stored zero points of a group, `[rows]`, float32: 256ths of its range.

    Every row loads the four bytes that hold its own: a copy to shared memory that the program does not wait for moves
    at least four. `zeros` points to the zero point of row 0, at a multiple of 16 bytes.
    """
    words = tl.load(zeros.to(tl.pointer_type(tl.int32), bitcast=True) + row // 4, mask=inside, other=0)
    return ((words >> (row % 4 * 8)) & 255).to(tl.float32)


@triton.jit
def as_tile(pairs, dtype: tl.constexpr, PERMUTED: tl.constexpr = False):
    """Reinterpret pairs of weights `[rows, 8, containers]` as weights `[rows, columns]` in dtype, at no cost.

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
    """Permute the columns of a group's inputs `[columns, tokens]` into the order that suits the tensor cores' operands.

    A thread takes four columns that are neighbours in this order, and the four that lie 16 further. Their weights come
    from one bit position of a word and the next, so that all threads shift alike. Their inputs are neighbours in
    memory, so that one load brings all inputs of an instruction into registers side by side.
    """
    COLUMNS: tl.constexpr = values.shape[0]
    TOKENS: tl.constexpr = values.shape[1]
    if COLUMNS > 16:
        values = tl.permute(tl.reshape(values, (4, 2, COLUMNS // 32, 2, 2, TOKENS)), (0, 3, 2, 1, 4, 5))
    return tl.reshape(values, (COLUMNS, TOKENS))
