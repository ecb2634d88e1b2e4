"""The kernel of `slimplus.kernels.packed_matmul`.

A program handles some rows of one layer, some tokens, and one of `split_k` shares of the groups of columns. Programs of
the same rows write float32 sums, and the last of them to finish adds these up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from slimplus.kernels.unpack import (
    as_tile,
    digit_bases,
    load_digit_words,
    load_exponents,
    load_scale,
    load_zero,
    permute_for_mma,
    unpack_digits,
    unpack_group,
)

MAX_DECODE_TOKENS = tl.constexpr(16)  # in a block; beyond, zero points are subtracted from weights, not from products
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter would multiply the bits of bfloat16


@triton.jit
def _accumulate_width(
    sums,
    inputs,
    plane1,
    plane2,
    plane4,
    plane8,
    scales,
    exponents,
    zeros,
    group_index,
    token,
    row,
    tokens,
    in_features,
    stride,
    ones,
    first,
    last,
    skipped1,
    skipped2,
    skipped4,
    skipped8,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the product of the groups `first … last - 1`, all of BITS bits, to `sums` `[rows, tokens]`.

    `skipped1`, … and `skipped8` are the numbers of the layer's groups before these that have no bits in the planes of
    1, 2, 4 and 8 bits.
    """
    CONTAINERS: tl.constexpr = GROUP_SIZE // 16
    dtype: tl.constexpr = inputs.dtype.element_ty
    # Before sm_90 the compiler does not share the sums of equal rows; larger tiles of inputs overflow the registers.
    FITS: tl.constexpr = token.shape[0] <= MAX_DECODE_TOKENS and GROUP_SIZE * token.shape[0] <= 2048
    # Integers of 8 bits are no bfloat16 between 1 and 2, which has 7 bits behind the point.
    NEW: tl.constexpr = _INTERPRETED or cuda_capability_geq(9, 0) or BITS == 8
    IN_PLACE: tl.constexpr = dtype == tl.bfloat16 and NEW and (FITS or BITS == 8)
    inside = row < stride
    following = tl.load(group_index + first, mask=first < last, other=0)
    for group in tl.range(first, last, num_stages=STAGES):
        # The index of the next group is on its way before its inputs are asked for.
        first_column = following.to(tl.int32) * GROUP_SIZE
        following = tl.load(group_index + min(group + 1, last - 1))
        if token.shape[0] > MAX_DECODE_TOKENS:
            column = first_column + tl.arange(0, GROUP_SIZE)[:, None]
            values = _load_inputs(inputs, token[None, :], column, tokens, in_features, RAGGED)
        else:
            # Tokens are the first dimension, so that 32 bytes of every token lie side by side in shared memory: with a
            # row for each token, these pieces would all lie in the same banks.
            sixteenths = first_column + tl.arange(0, CONTAINERS)[None, :, None] * 16
            column = sixteenths + tl.arange(0, 16)[None, None, :]
            values = _load_inputs(inputs, token[:, None, None], column, tokens, in_features, RAGGED)
            values = permute_for_mma(tl.reshape(tl.permute(values, (1, 2, 0)), (GROUP_SIZE, token.shape[0])))
        first1 = (group - skipped1) * CONTAINERS
        first2 = (group - skipped2) * CONTAINERS
        first4 = (group - skipped4) * 2 * CONTAINERS
        first8 = (group - skipped8) * 4 * CONTAINERS
        scale = load_scale(scales, exponents, group, stride, row, inside)
        zero = load_zero(zeros + group * stride, row, inside)
        if IN_PLACE:
            # Sums with the same left operand in all rows come first: the compiler computes them once.
            product = tl.zeros((row.shape[0], token.shape[0]), tl.float32)
            for PLANE in tl.static_range(3):
                if BITS >> PLANE & 1:
                    product = _subtract_bases(product, values, ones, 1 << PLANE, BITS & ((1 << PLANE) - 1))
            if BITS & 8:
                product = _subtract_bases(product, values, ones, 8, 0)
                product = _subtract_bases(product, values, ones, 8, 4)
                words = load_digit_words(plane8, first8, stride, row, inside, 8, CONTAINERS)
                product = _multiply_digits(product, words, values, ones, 8, 0, False)
                product = _multiply_digits(product, words, values, ones, 8, 4, True)
            if BITS & 4:
                product = _add_digits(product, plane4, first4, values, stride, row, inside, ones, 4, BITS & 3)
            if BITS & 2:
                product = _add_digits(product, plane2, first2, values, stride, row, inside, ones, 2, BITS & 1)
            if BITS & 1:
                product = _add_digits(product, plane1, first1, values, stride, row, inside, ones, 1, 0)
            sums += scale[:, None] * product
            sums -= (scale * zero)[:, None] * _column_sums(values, row.shape[0], (1 << BITS) / 256)
        else:
            pairs = unpack_group(
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
                BITS,
                GROUP_SIZE,
                dtype,
            )
            zero *= 1 / 256
            if token.shape[0] > MAX_DECODE_TOKENS:
                product = _dot(_centred(pairs, zero, ones, dtype), values)
            else:
                product = _dot(as_tile(pairs, dtype, PERMUTED=True), values)
                product -= (1 + zero)[:, None] * _column_sums(values, row.shape[0], 1.0)
            sums += (scale * (1 << BITS))[:, None] * product
    return sums


@triton.jit
def _subtract_bases(product, values, ones, PLANE: tl.constexpr, LOWEST: tl.constexpr):
    """Subtract what `_add_digits` adds beside the digits."""
    shape: tl.constexpr = (product.shape[0], 8, values.shape[0] // 16)
    bases = tl.broadcast_to(digit_bases(ones, PLANE, LOWEST)[None, :, None] | -0x7FFF8000, shape)  # both negative
    return _dot(as_tile(bases, tl.bfloat16, PERMUTED=True), values, product)


@triton.jit
def _add_digits(
    product, plane, first_word, values, stride, row, inside, ones, PLANE: tl.constexpr, LOWEST: tl.constexpr
):
    """Add the product of a group's digits in one plane, the bits from LOWEST up, with inputs `[columns, tokens]`."""
    CONTAINERS: tl.constexpr = values.shape[0] // 16
    words = load_digit_words(plane, first_word, stride, row, inside, PLANE, CONTAINERS)
    return _multiply_digits(product, words, values, ones, PLANE, LOWEST, False)


@triton.jit
def _multiply_digits(product, words, values, ones, PLANE: tl.constexpr, LOWEST: tl.constexpr, HIGH: tl.constexpr):
    """Add the product of the digits in some words with inputs `[columns, tokens]`, see `unpack_digits`."""
    pairs = unpack_digits(words, ones, PLANE, LOWEST, HIGH)
    return _dot(as_tile(pairs, tl.bfloat16, PERMUTED=True), values, product)


@triton.jit
def _load_inputs(inputs, token, column, tokens, in_features, RAGGED: tl.constexpr):
    """Load the inputs at `token` and `column`, which broadcast; zeros beyond the last token or column."""
    exists = token < tokens
    if RAGGED:
        exists &= column < in_features
    return tl.load(inputs + token * in_features + column, mask=exists, other=0.0, eviction_policy="evict_last")


@triton.jit
def _dot(left, right, addend=None):
    """Multiply two tiles of 16 bits, and add `addend` if there is one."""
    if _INTERPRETED:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        return product if addend is None else product + addend
    return tl.dot(left, right, addend)


_ADD_FLOAT16 = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")
_ADD_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 minus, half; xor.b32 minus, $2, 0x80008000; "
    "fma.rn.bf16x2 half, $1, $2, minus; fma.rn.bf16x2 $0, half, $2, $3; }"
)


@triton.jit
def _centred(pairs, zero, ones, dtype: tl.constexpr):
    """Return `q / 2**bits - zero`, `[rows, columns]`, of pairs of `1 + q / 2**bits`; exact, as `zero` has 8 bits."""
    if _INTERPRETED:  # the interpreter runs no assembly
        return as_tile(pairs, dtype).to(tl.float32) - 1 - zero[:, None]
    # In bfloat16 the 1 is subtracted first: 1 + zero would need 9 bits.
    addend = -(1 + zero) if dtype == tl.float16 else -zero
    bits = addend.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
    addends = tl.broadcast_to((bits | (bits << 16))[:, None, None], pairs.shape)
    assembly: tl.constexpr = _ADD_FLOAT16 if dtype == tl.float16 else _ADD_BFLOAT16
    pairs = tl.inline_asm_elementwise(assembly, "=r,r,r,r", [pairs, ones, addends], tl.int32, is_pure=True, pack=1)
    return as_tile(pairs, dtype)


@triton.jit
def _column_sums(values, ROWS: tl.constexpr, FACTOR: tl.constexpr):
    """Sum `values` `[columns, tokens]` over the columns, `[ROWS, tokens]`, the same in every row, times a power of two.

    A product with constants leaves the sums in the registers that need them. Its rows are equal, and the compiler
    computes them once.
    """
    if _INTERPRETED:
        return tl.sum(values.to(tl.float32), 0)[None, :] * FACTOR
    half = tl.full((ROWS, values.shape[0] // 2), FACTOR, values.dtype)
    return tl.dot(tl.reshape(tl.join(half, half), (ROWS, values.shape[0])), values)


@triton.jit(do_not_specialize=["tokens"])
def packed_matmul_kernel(
    inputs,
    plane1,
    plane2,
    plane4,
    plane8,
    scales,
    zeros,
    group_index,
    layer_table,
    bias,
    partials,
    counters,
    outputs,
    tokens,
    in_features,
    out_features,
    padded_features,
    WIDTHS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LAYERS: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply a block of rows by a block of tokens; the grid is row blocks of all layers, `split_k`, token blocks.

    `slimplus.kernels.fused` describes the entries of `layer_table`.
    """
    entry = layer_table
    first_block = 0
    blocks = 0
    for layer in tl.static_range(1, LAYERS):
        blocks += tl.cdiv(tl.load(layer_table + (layer - 1) * 32) * 16, BLOCK_N)
        beyond = tl.program_id(0) >= blocks
        entry = tl.where(beyond, layer_table + layer * 32, entry)
        first_block = tl.where(beyond, blocks, first_block)
    stride = tl.load(entry) * 16
    rows = tl.load(entry + 1)
    first_output = tl.load(entry + 2)
    first_padded = tl.load(entry + 11) * 16
    plane1 += tl.load(entry + 3).to(tl.int64) * 16
    plane2 += tl.load(entry + 4).to(tl.int64) * 16
    plane4 += tl.load(entry + 5).to(tl.int64) * 16
    plane8 += tl.load(entry + 6).to(tl.int64) * 16
    scales += tl.load(entry + 7).to(tl.int64) * 16
    zeros += tl.load(entry + 12).to(tl.int64) * 16
    group_index += tl.load(entry + 8)
    ones = tl.load(entry + (9 if inputs.dtype.element_ty == tl.float16 else 10))
    WIDE: tl.constexpr = WIDTHS >= 1 << 5
    stop1 = tl.load(entry + 16)
    stop2 = tl.load(entry + 17)
    stop3 = tl.load(entry + 18)
    stop4 = tl.load(entry + 19)
    stop5 = tl.load(entry + 20) if WIDE else stop4
    stop6 = tl.load(entry + 21) if WIDE else stop4
    stop7 = tl.load(entry + 22) if WIDE else stop4
    stop8 = tl.load(entry + 23) if WIDE else stop4

    row = (tl.program_id(0) - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exponents = load_exponents(scales, stop8, stride, row, row < stride)
    split_k = tl.num_programs(1)
    stops = (stop1, stop2, stop3, stop4, stop5, stop6, stop7, stop8)
    first = _share(tl.program_id(1), split_k, stops, WIDE)
    last = _share(tl.program_id(1) + 1, split_k, stops, WIDE)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for BITS in tl.static_range(1, 9):
        if WIDTHS >> BITS & 1:
            sums = _accumulate_width(
                sums,
                inputs,
                plane1,
                plane2,
                plane4,
                plane8,
                scales,
                exponents,
                zeros,
                group_index,
                token,
                row,
                tokens,
                in_features,
                stride,
                ones,
                max(first, stops[BITS - 2] if BITS > 1 else 0),
                min(last, stops[BITS - 1]),
                _without_plane1(stops, BITS),
                stop1 + (stop5 - stop3) if BITS >= 6 else stop1,
                stop3,
                stop7,
                BITS,
                GROUP_SIZE,
                RAGGED,
                STAGES,
            )

    if split_k == 1:
        _store(sums, outputs, bias, row, token, rows, tokens, first_output, out_features, HAS_BIAS)
    else:
        written = (row < stride)[:, None] & (token < tokens)[None, :]
        place = token[None, :] * padded_features + (first_padded + row)[:, None]
        size = tokens * padded_features
        tl.store(partials + tl.program_id(1) * size + place, sums, mask=written)
        tl.debug_barrier()  # all threads have written their sums before the counter rises
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == split_k - 1:
            tl.store(counter, 0)
            if tokens == 1:
                column = _add_parts(partials + first_padded, size, row, stride, split_k)[:, None]
                _store(column, outputs, bias, row, tl.arange(0, 1), rows, 1, first_output, out_features, HAS_BIAS)
            else:
                total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                AT_ONCE: tl.constexpr = max(1, 4096 // (BLOCK_N * BLOCK_M))  # loads in flight hide each other's latency
                for first in range(0, split_k, AT_ONCE):
                    for split in tl.static_range(AT_ONCE):
                        part = partials + (first + split) * size + place
                        # ".cg" bypasses the L1 cache, which may hold sums of another launch at the same address.
                        total += tl.load(part, written & (first + split < split_k), 0.0, cache_modifier=".cg")
                _store(total, outputs, bias, row, token, rows, tokens, first_output, out_features, HAS_BIAS)


@triton.jit
def _add_parts(partials, size, row, stride, split_k):
    """Add up the sums of all programs for one token, `[rows]`, many of them at once."""
    total = tl.zeros_like(row).to(tl.float32)
    for first in range(0, split_k, 16):
        split = first + tl.arange(0, 16)[:, None]
        part = partials + split * size + row[None, :]
        total += tl.sum(tl.load(part, (split < split_k) & (row < stride)[None, :], 0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _without_plane1(stops, BITS: tl.constexpr):
    """Return the number of groups before those of BITS bits that have no bit in the plane of 1 bit."""
    count = 0
    if BITS >= 3:
        count += stops[1] - stops[0]
    if BITS >= 5:
        count += stops[3] - stops[2]
    if BITS >= 7:
        count += stops[5] - stops[4]
    return count


_COST, _COST3, _COST4 = tl.constexpr(8), tl.constexpr(13), tl.constexpr(9)  # of a group of up to 2, 3 and 4 bits
_COST_WIDE = tl.constexpr(16)  # of a group of 5 to 8 bits


@triton.jit
def _share(program, split_k, stops, WIDE: tl.constexpr):
    """Return the first group of a program; programs get shares of about the same cost, of groups that are neighbours.

    Groups are sorted by width, so most programs see one width, and fill their pipeline once.
    """
    stop2, stop3, stop4, stop8 = stops[1], stops[2], stops[3], stops[7]
    before3 = stop2 * _COST
    before4 = before3 + (stop3 - stop2) * _COST3
    before_wide = before4 + (stop4 - stop3) * _COST4
    total = before_wide
    if WIDE:
        total += (stop8 - stop4) * _COST_WIDE
    cost = total * program // split_k
    wide = tl.where(cost < before4, stop2 + (cost - before3) // _COST3, stop3 + (cost - before4) // _COST4)
    if WIDE:
        wide = tl.where(cost < before_wide, wide, stop4 + (cost - before_wide) // _COST_WIDE)
    return tl.where(cost < before3, cost // _COST, wide)


@triton.jit
def _store(sums, outputs, bias, row, token, rows, tokens, first_output, out_features, HAS_BIAS: tl.constexpr):
    """Write `sums` `[rows, tokens]`, plus the bias, to their place in the output."""
    output = first_output + row
    if HAS_BIAS:
        sums += tl.load(bias + output, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    exists = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(outputs + token[None, :] * out_features + output[:, None], sums.to(outputs.dtype.element_ty), mask=exists)
