"""Second moments of a site's inputs over the calibration windows, summed so that the order of the
windows does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.blocks.ranks import ALONE, Ranks

__all__ = ["Moments", "corrected_target"]

# of the mean diagonal: the least-squares correction sees fewer tokens than unknowns in narrow
# directions
_CROSS_DAMP = 0.05


class Moments:
    """H = sum x^ x^^T of the inputs x^ that the kernel sees, and C = sum (x - x^) x^^T against the
    float model's inputs x.

    Each window's product is made in fp32 and added in fp64, whose rounding differs by 1e-16 with
    the order of the windows: the same codes come out however many processes share the windows.

    Args:
        size: K.
        cross: whether C is kept.
    """

    def __init__(self, size: int, cross: bool, device: str = "cpu") -> None:
        self.hessian = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(size, size, dtype=torch.float64, device=device) if cross else None

    def add(self, seen: Tensor, wanted: Tensor | None = None) -> None:
        """One window [L, K]: what the kernel sees, and the float model's input."""
        self.hessian += (seen.T @ seen).double()
        if self.cross is not None:
            assert wanted is not None
            self.cross += ((wanted - seen).T @ seen).double()

    def reduce(self, ranks: Ranks = ALONE) -> None:
        """Add up over the processes."""
        ranks.sum([self.hessian, *([] if self.cross is None else [self.cross])])


def corrected_target(weight: Tensor, moments: Moments, share: float = 1.0) -> Tensor:
    """The weight whose product with the inputs that the kernel sees comes nearest to W x of the
    float model, least squares.

    min over W' of sum ||W' x^ - W x||^2 gives W' = W + W C H^-1. GPTQ alone aims at W x^ and lets
    the errors of earlier layers and of the activation codes stand (GPTAQ, arXiv 2504.02692, and
    QEP, arXiv 2504.09629, correct for them in their own ways).

    Args:
        weight: [N, K].
        share: 0 leaves the weight, 1 corrects in full.
    """
    if moments.cross is None or share == 0:
        return weight
    damped = moments.hessian.clone()
    diagonal = torch.diagonal(damped)
    diagonal.add_(_CROSS_DAMP * diagonal.mean().clamp(min=2.0**-100))
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped, diagonal
    if failed or not torch.isfinite(moments.cross).all():
        return weight
    change = torch.cholesky_solve((weight.double() @ moments.cross).T, lower).T
    return (weight.double() + share * change).float()
