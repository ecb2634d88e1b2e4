"""The kernel of `slimplus.kernels.packed_matmul`.

A program handles some rows of one layer, some tokens, and every `split_k`-th group of columns, whatever the widths of
the groups are. Programs of the same rows write float32 sums, and the last of them to finish adds these up in a fixed
order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from slimplus.kernels.unpack import (
    as_tile,
    digit_bases,
    load_exponents,
    load_scale,
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
    start,
    stop,
    skipped1,
    skipped2,
    skipped4,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add this program's share of the groups `start … stop - 1`, all of BITS bits, to `sums` `[rows, tokens]`.

    `skipped1`, `skipped2` and `skipped4` are the numbers of the layer's groups before these that have no bits in the
    planes of 1, 2 and 4 bits.
    """
    CONTAINERS: tl.constexpr = GROUP_SIZE // 16
    dtype: tl.constexpr = inputs.dtype.element_ty
    split_k = tl.num_programs(1)
    first = start + (tl.program_id(1) + split_k - start % split_k) % split_k
    inside = row < stride
    for group in tl.range(first, stop, split_k, num_stages=STAGES):
        first_column = tl.load(group_index + group).to(tl.int32) * GROUP_SIZE
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
        scale = load_scale(scales, exponents, group, stride, row, inside)
        zero = tl.load(zeros + group * stride + row, mask=inside, other=0).to(tl.float32) * (1 / 256)
        if token.shape[0] <= MAX_DECODE_TOKENS and dtype == tl.bfloat16 and (_INTERPRETED or cuda_capability_geq(9, 0)):
            # Sums with the same left operand in all rows come first: the compiler computes them once.
            product = tl.zeros((row.shape[0], token.shape[0]), tl.float32)
            for PLANE in tl.static_range(3):
                if BITS >> PLANE & 1:
                    product = _subtract_bases(product, values, ones, 1 << PLANE, BITS & ((1 << PLANE) - 1))
            if BITS & 4:
                product = _add_digits(product, plane4, first4, values, stride, row, inside, ones, 4, BITS & 3)
            if BITS & 2:
                product = _add_digits(product, plane2, first2, values, stride, row, inside, ones, 2, BITS & 1)
            if BITS & 1:
                product = _add_digits(product, plane1, first1, values, stride, row, inside, ones, 1, 0)
            sums += scale[:, None] * product
            sums -= (scale * zero * (1 << BITS))[:, None] * _column_sums(values, row.shape[0])
        else:
            pairs = unpack_group(
                plane1,
                plane2,
                plane4,
                plane4,
                first1,
                first2,
                first4,
                0,
                stride,
                row,
                inside,
                ones,
                BITS,
                GROUP_SIZE,
                dtype,
            )
            if token.shape[0] > MAX_DECODE_TOKENS:
                product = _dot(_centred(pairs, zero, ones, dtype), values)
            else:
                product = _dot(as_tile(pairs, dtype, PERMUTED=True), values)
                product -= (1 + zero)[:, None] * _column_sums(values, row.shape[0])
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
    pairs = unpack_digits(plane, first_word, stride, row, inside, ones, PLANE, LOWEST, False, CONTAINERS)
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
def _column_sums(values, ROWS: tl.constexpr):
    """Sum `values` `[columns, tokens]` over the columns, `[ROWS, tokens]`, the same in every row.

    A product with ones leaves the sums in the registers that need them. Its rows are equal, and the compiler computes
    them once.
    """
    if _INTERPRETED:
        return tl.sum(values.to(tl.float32), 0)[None, :]
    half = tl.full((ROWS, values.shape[0] // 2), 1.0, values.dtype)
    return tl.dot(tl.reshape(tl.join(half, half), (ROWS, values.shape[0])), values)


@triton.jit(do_not_specialize=["tokens"])
def packed_matmul_kernel(
    inputs,
    plane1,
    plane2,
    plane4,
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
        blocks += tl.cdiv(tl.load(layer_table + (layer - 1) * 16) * 16, BLOCK_N)
        beyond = tl.program_id(0) >= blocks
        entry = tl.where(beyond, layer_table + layer * 16, entry)
        first_block = tl.where(beyond, blocks, first_block)
    stride = tl.load(entry) * 16
    rows = tl.load(entry + 1)
    first_output = tl.load(entry + 2)
    first_padded = tl.load(entry + 14) * 16
    plane1 += tl.load(entry + 3).to(tl.int64) * 16
    plane2 += tl.load(entry + 4).to(tl.int64) * 16
    plane4 += tl.load(entry + 5).to(tl.int64) * 16
    scales += tl.load(entry + 6).to(tl.int64) * 16
    zeros += tl.load(entry + 15).to(tl.int64) * 16
    group_index += tl.load(entry + 7)
    stop1 = tl.load(entry + 8)
    stop2 = tl.load(entry + 9)
    stop3 = tl.load(entry + 10)
    stop4 = tl.load(entry + 11)
    ones = tl.load(entry + (12 if inputs.dtype.element_ty == tl.float16 else 13))

    row = (tl.program_id(0) - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exponents = load_exponents(scales, stop4, stride, row, row < stride)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for BITS in tl.static_range(1, 5):
        if WIDTHS >> BITS & 1:
            start = 0 if BITS == 1 else stop1 if BITS == 2 else stop2 if BITS == 3 else stop3
            stop = stop1 if BITS == 1 else stop2 if BITS == 2 else stop3 if BITS == 3 else stop4
            skipped1 = stop2 - stop1 if BITS == 3 else 0
            sums = _accumulate_width(
                sums,
                inputs,
                plane1,
                plane2,
                plane4,
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
                start,
                stop,
                skipped1,
                stop1,
                stop3,
                BITS,
                GROUP_SIZE,
                RAGGED,
                STAGES,
            )

    split_k = tl.num_programs(1)
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
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            AT_ONCE: tl.constexpr = max(1, 4096 // (BLOCK_N * BLOCK_M))  # loads in flight, which hide their latency
            for first in range(0, split_k, AT_ONCE):
                for split in tl.static_range(AT_ONCE):
                    part = partials + (first + split) * size + place
                    # ".cg" bypasses the L1 cache, which may hold sums of another launch at the same address.
                    total += tl.load(part, written & (first + split < split_k), 0.0, cache_modifier=".cg")
            _store(total, outputs, bias, row, token, rows, tokens, first_output, out_features, HAS_BIAS)


@triton.jit
def _store(sums, outputs, bias, row, token, rows, tokens, first_output, out_features, HAS_BIAS: tl.constexpr):
    """Write `sums` `[rows, tokens]`, plus the bias, to their place in the output."""
    output = first_output + row
    if HAS_BIAS:
        sums += tl.load(bias + output, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    exists = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(outputs + token[None, :] * out_features + output[:, None], sums.to(outputs.dtype.element_ty), mask=exists)
