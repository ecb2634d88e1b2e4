"""Least-squares fit of scales and zero points to integers that are already chosen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from slimplus.format.affine import QuantizedWeight, dequantize, storable_scale, storable_zero_point

RIDGE = 1e-4  # share of the mean diagonal added to the equations, which are singular for a group of equal integers
MAX_COEFFICIENTS = 2**27  # of the normal equations solved at a time, to bound memory


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Return the output error `e H eᵀ` of each row `e` of a weight error `[out, in]`, `[out]`."""
    return (error @ hessian).mul_(error).sum(dim=1)


def refit_qparams(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point `[out, groups]` that minimise the output error for the integers of `quantized`.

    The levels of a row are linear in its scales `s` and offsets `-s z`: the best values solve `2 groups` normal
    equations. A row keeps its old values where the solution, rounded to what the packed format can hold, is no better.

    Zero points that must be integers are rounded, which moves all levels of a group. The scales are therefore fitted
    again, to the rounded zero points and to the old ones, and the better pair is taken.

    Args:
        weight: the weight to approximate, `[out, in]`.
        quantized: the integers, and the scale and zero point to improve.
        hessian: Hessian of the layer's inputs, `[in, in]`.
    """
    rows_at_a_time = max(MAX_COEFFICIENTS // (2 * quantized.scale.shape[1]) ** 2, 1)
    rows = (t.split(rows_at_a_time) for t in (weight, quantized.integers, quantized.scale, quantized.zero_point))
    parts = [
        _refit_rows(w, replace(quantized, integers=q, scale=scale, zero_point=zero_point), hessian)
        for w, q, scale, zero_point in zip(*rows, strict=True)
    ]
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _refit_rows(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `refit_qparams` returns, for some rows of the weight."""
    integers, scale, zero_point = quantized.integers, quantized.scale, quantized.zero_point
    group_size = quantized.group_size
    residual = weight - dequantize(integers, scale, zero_point, group_size)
    projected = residual @ hessian
    normal, moment = _normal_equations(integers.float(), projected, hessian, group_size)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    ridge = ridge.clamp(min=torch.finfo(ridge.dtype).tiny)  # for a layer whose inputs are all zero
    step = torch.linalg.solve(normal + torch.diag_embed(ridge.expand_as(moment)), moment)
    new_scale, offset = (torch.cat([scale, -scale * zero_point], dim=1) + step).chunk(2, dim=1)
    new_scale = storable_scale(torch.where(new_scale > 0, new_scale, scale), quantized.scale_bits)
    bits = quantized.bits.to(weight.device)
    new_zero = storable_zero_point(-offset / new_scale, bits, quantized.integer_zero_points)
    candidates = [(new_scale, new_zero)]
    if quantized.integer_zero_points:
        fit = partial(_refit_scales, quantized, normal, moment, ridge)
        candidates += [(fit(zeros), zeros) for zeros in (new_zero, zero_point)]
    best = projected.mul_(residual).sum(dim=1)  # as `output_error` has it
    for scales, zeros in candidates:
        error = output_error(weight - dequantize(integers, scales, zeros, group_size), hessian)
        better = (error < best)[:, None]
        best = torch.minimum(error, best)
        scale, zero_point = torch.where(better, scales, scale), torch.where(better, zeros, zero_point)
    return scale, zero_point


def _refit_scales(
    quantized: QuantizedWeight, normal: Tensor, moment: Tensor, ridge: Tensor, zero_point: Tensor
) -> Tensor:
    """Return the scales `[rows, groups]` that minimise the output error for given zero points.

    A change of a scale by 1 changes its group's offset by `-zero_point`, which leaves `groups` equations of the
    `2 groups` that `_normal_equations` returns.

    Args:
        quantized: the weight that the equations are for.
        normal: the equations, `[rows, 2 groups, 2 groups]`.
        moment: their right side, `[rows, 2 groups]`.
        ridge: what is added to their diagonal, `[rows, 1]`.
        zero_point: the zero points, `[rows, groups]`.
    """
    scale, groups = quantized.scale, zero_point.shape[1]
    # What is left to explain once the zero points have changed: the residual, less the change of the offsets.
    moved = torch.cat([torch.zeros_like(scale), scale * (quantized.zero_point - zero_point)], dim=1)
    rest = moment - (normal @ moved[..., None])[..., 0]
    step_of = torch.cat(
        [torch.eye(groups, device=scale.device).expand(len(scale), -1, -1), torch.diag_embed(-zero_point)], 1
    )
    reduced = step_of.mT @ normal @ step_of
    step = torch.linalg.solve(
        reduced + torch.diag_embed(ridge.expand_as(scale)), (step_of.mT @ rest[..., None])[..., 0]
    )
    return storable_scale(torch.where(scale + step > 0, scale + step, scale), quantized.scale_bits)


def _normal_equations(integers: Tensor, projected: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the normal equations of each row, `[rows, 2 groups, 2 groups]`, and their right side `[rows, 2 groups]`.

    The unknowns are the changes of a row's scales, then those of its offsets.

    Args:
        integers: the integers, `[rows, in]`, float32.
        projected: the rows' present error times the Hessian, `[rows, in]`.
        hessian: Hessian of the layer's inputs, `[in, in]`.
        group_size: columns a group.
    """

    def sum_groups(values: Tensor) -> Tensor:
        if missing := -values.shape[-1] % group_size:
            values = torch.nn.functional.pad(values, (0, missing))
        return values.unflatten(-1, (-1, group_size)).sum(-1)

    moment = torch.cat([sum_groups(projected * integers), sum_groups(projected)], dim=1)
    scale_rows, mixed_rows, offset_rows = [], [], []
    for columns, rows_of_hessian in zip(
        integers.split(group_size, dim=1), hessian.split(group_size, dim=0), strict=True
    ):
        product = columns @ rows_of_hessian
        scale_rows.append(sum_groups(product * integers))
        mixed_rows.append(sum_groups(product))
        offset_rows.append(sum_groups(rows_of_hessian.sum(dim=0)))
    mixed = torch.stack(mixed_rows, dim=1)
    offsets = torch.stack(offset_rows).expand(len(integers), -1, -1)
    top = torch.cat([torch.stack(scale_rows, dim=1), mixed], dim=2)
    return torch.cat([top, torch.cat([mixed.transpose(1, 2), offsets], dim=2)], dim=1), moment
