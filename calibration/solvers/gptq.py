"""GPTQ (arXiv 2210.17323): rounds columns one by one and makes up for each error in the columns not
yet rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.solvers.grid import Grid

__all__ = [
    "NO_INPUTS",
    "Factored",
    "GptqResult",
    "factored",
    "gptq",
    "quadratic_error",
    "says_something",
]

NO_INPUTS = "no usable calibration inputs, rounded to nearest"  # a note for the report
_BLOCK = 128  # columns updated together
_MAX_DAMP = 10.0


@dataclass(frozen=True)
class GptqResult:
    """Codes [N, K] and what they cost.

    Attributes:
        codes: integers as fp32.
        values: the weights they stand for.
        note: what had to be done to a Hessian that could not be factored, or "".
    """

    codes: Tensor
    values: Tensor
    note: str = ""


def quadratic_error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """tr((W - W^) H (W - W^)^T): the squared output error over the calibration data, up to H's
    normalisation.
    """
    difference = (values - weight).double()
    return float(((difference @ hessian.double()) * difference).sum())


def says_something(hessian: Tensor) -> bool:
    """Whether a Hessian is of any inputs but zeros, and finite."""
    return bool(torch.isfinite(hessian).all() and torch.diagonal(hessian).sum() > 0)


@dataclass(frozen=True)
class Factored:
    """A Hessian made ready for any number of GPTQ runs.

    Attributes:
        order: of the columns.
        dead: channels that are always 0, [K].
        factor: upper Cholesky factor of the damped inverse, in that order; None if there is no
            usable one.
        note: what had to be done to it, or "".
    """

    order: Tensor
    dead: Tensor
    factor: Tensor | None
    note: str


def factored(hessian: Tensor, damp: float = 0.01, act_order: bool = True) -> Factored:
    """Ready for gptq().

    Args:
        hessian: sum of x x^T over calibration inputs as the kernel sees them, [K, K], any scale.
        damp: part of the mean diagonal that is added to it; raised tenfold while the matrix is
            singular.
        act_order: columns in descending order of the diagonal instead of from left to right.
    """
    diagonal = torch.diagonal(hessian).double().clone()
    order = torch.arange(len(diagonal), device=hessian.device)
    if not says_something(hessian):
        return Factored(order, torch.zeros_like(diagonal, dtype=torch.bool), None, NO_INPUTS)
    dead = diagonal <= 0
    diagonal[dead] = diagonal[
        ~dead
    ].mean()  # a channel that is always 0: any weight does, so the nearest code to 0
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian.double()[order][:, order]  # a copy
    torch.diagonal(ordered).copy_(diagonal[order])
    factor, note = _inverse_factor(ordered, damp)
    return Factored(order, dead, factor, note)


def gptq(weight: Tensor, hessian: Factored, grid: Grid, group: Tensor) -> GptqResult:
    """Codes on a fixed grid (static groups), in fp64.

    Args:
        weight: [N, K].
        hessian: of the inputs.
        grid: of `weight`, in the original column order.
        group: the grid's group of each column, int64 [K].
    """
    if hessian.factor is None:
        codes, values = grid.round(weight, group)
        return GptqResult(codes, values, hessian.note)
    columns = (
        torch.where(hessian.dead, 0.0, weight.double()).T[hessian.order].contiguous()
    )  # [K, N]
    codes, values = _rounded(columns, hessian.factor, grid, group[hessian.order])
    inverse = torch.argsort(hessian.order)
    return GptqResult(codes[inverse].T.contiguous(), values[inverse].T.contiguous(), hessian.note)


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, str]:
    """Upper Cholesky factor of the damped Hessian's inverse; the diagonal of the Hessian is written over. Of a
    wide input these are the largest tensors of a calibration: at most three are held at a time.
    """
    damped = torch.diagonal(hessian)
    diagonal, mean, used = damped.clone(), damped.mean(), damp
    while True:
        damped.copy_(diagonal + used * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not failed and torch.isfinite(factor).all():
                return (
                    factor,
                    ""
                    if used == damp
                    else f"singular Hessian, damped by {used:g} of its mean diagonal",
                )
        if used >= _MAX_DAMP:
            return torch.eye(
                len(hessian), dtype=hessian.dtype, device=hessian.device
            ), "singular Hessian, rounded to nearest"
        used = max(used, 1e-4) * 10


def _rounded(columns: Tensor, factor: Tensor, grid: Grid, group: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values [K, N] of columns [K, N], which are consumed."""
    codes, values = (
        torch.empty_like(columns, dtype=torch.float32),
        torch.empty_like(columns, dtype=torch.float32),
    )
    groups, pivots = group.tolist(), torch.diagonal(factor).tolist()
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        errors = torch.empty_like(columns[start:end])
        for k in range(start, end):
            codes[k], values[k] = grid.round(columns[k].float(), groups[k])
            errors[k - start] = (columns[k] - values[k]) / pivots[k]
            columns[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes, values
