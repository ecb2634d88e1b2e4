"""Rounding of a group's columns with error compensation (GPTQ, arXiv 2210.17323), a block of rows a program.

PyTorch takes a dozen launches for each column, and the GPU waits between them. Rows do not depend on each other, so
that a program can go through all the columns of a group with its rows in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048  # that a program holds in registers; twice as many would spill
INTEGERS_ABOVE = tl.constexpr(1.5 * 2**23)  # adding this to a float32 rounds it to an integer, ties to even


@triton.jit
def _round_columns_kernel(
    tile,
    upper,
    scale,
    zero_point,
    errors,
    rows,
    columns,
    largest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(tile + place, exists, other=0.0)
    step = tl.load(scale + row, row < rows, other=1.0)
    zero = tl.load(zero_point + row, row < rows, other=0.0)
    whole = tl.floor(zero)
    for current in range(columns):
        here = (column == current)[None, :]
        real = tl.sum(tl.where(here, values, 0.0), 1)
        position = tl.div_rn(real, step) + (zero - whole)
        position = tl.minimum(tl.maximum(position, -1024.0), 1024.0)  # wider than any grid
        nearest = (position + INTEGERS_ABOVE) - INTEGERS_ABOVE + whole
        nearest = tl.minimum(tl.maximum(nearest, 0.0), largest)
        factors = tl.load(upper + current * columns + column, column < columns, other=0.0)
        diagonal = tl.sum(tl.where(column == current, factors, 0.0), 0)
        error = tl.div_rn(real - (nearest - zero) * step, diagonal)
        tl.store(errors + row.to(tl.int64) * columns + current, error, row < rows)
        values -= error[:, None] * tl.where(column > current, factors, 0.0)[None, :]
    tl.store(tile + place, values, exists)


def choose_blocks(columns: int) -> dict[str, int]:
    """Return the rows and columns that a program holds, for groups of `columns` columns."""
    padded = triton.next_power_of_2(columns)
    return {"ROWS": max(VALUES // padded, 1), "COLUMNS": padded}


def round_columns(tile: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> Tensor:
    """Round `tile` column by column, moving each error into the columns after it, in place.

    Args:
        tile: the group's weights, `[out, columns]`, float32, contiguous; each column is left as it was just before it
            was rounded.
        upper: the group's square of the inverse Hessian's Cholesky factor, `[columns, columns]`.
        scale: scales of the group, `[out]`.
        zero_point: zero points of the group, `[out]`.
        largest: largest integer of the grid, at most 255.

    Returns:
        The rounding errors over the diagonal of `upper`, `[out, columns]`.
    """
    rows, columns = tile.shape
    errors = torch.empty_like(tile)
    blocks = choose_blocks(columns)
    _round_columns_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        tile,
        upper.contiguous(),
        scale.contiguous(),
        zero_point.contiguous(),
        errors,
        rows,
        columns,
        largest,
        **blocks,
    )
    return errors
