"""How far a quantised block is from the float one: output error, direction of each token, attention
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LossWeights",
    "attention_divergence",
    "block_loss",
    "direction_loss",
    "output_error",
    "sample_rows",
]

_LEAST_COSINE = 1e-6  # keeps the logarithm finite where outputs are orthogonal


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms of the block loss; the paper's are all 1, and 0 leaves a term out.

    Attributes:
        error: squared error of the block output.
        direction: distribution correction, -log of the mean cosine per token.
        attention: symmetric Kullback-Leibler divergence of attention rows.
    """

    error: float = 1.0
    direction: float = 1.0
    attention: float = 1.0


def output_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's mean square: a pure number, whatever the scale of the
    block.
    """
    return F.mse_loss(y, target) / target.square().mean().clamp(min=torch.finfo(target.dtype).tiny)


def direction_loss(y: Tensor, target: Tensor) -> Tensor:
    """Distribution correction (DLC), -log |mean over tokens of cos(y, target)|; y and target [...,
    tokens, hidden].
    """
    return -F.cosine_similarity(y, target, dim=-1).mean().abs().clamp(min=_LEAST_COSINE).log()


def attention_divergence(log_p: Tensor, log_target: Tensor) -> Tensor:
    """KL(P || T) + KL(T || P) of attention rows (AKL), summed over keys, averaged over heads and
    queries.

    Args:
        log_p, log_target: logarithms of the probabilities, [..., heads, queries, keys]; -inf on the
            keys after a query, in both.
    """
    difference = (log_p - log_target).masked_fill(log_target == -torch.inf, 0.0)
    return ((log_p.exp() - log_target.exp()) * difference).sum(-1).mean()


def block_loss(
    y: Tensor, targets: Sequence[Tensor], rows: tuple[Tensor, Tensor] | None, weights: LossWeights
) -> Tensor:
    """The training loss of one window: error and direction terms summed over the targets, and the
    attention term.

    Args:
        y: output of the quantised block, [..., tokens, hidden].
        targets: outputs of the float block: on the float stream, and on the quantised one where it
            counts.
        rows: log-probabilities of sampled attention rows, quantised and float; None leaves the term
            out.
    """
    loss = y.new_zeros(())
    for target in targets:
        if weights.error:
            loss = loss + weights.error * output_error(y, target)
        if weights.direction:
            loss = loss + weights.direction * direction_loss(y, target)
    if rows is not None:
        loss = loss + weights.attention * attention_divergence(*rows)
    return loss


def sample_rows(length: int, count: int, window: int) -> Tensor:
    """`count` query positions spread evenly over 0..length-1, shifted from window to window, the
    same at every visit of one.
    """
    count = min(count, length)
    offset = window * 0.6180339887 % 1.0  # golden ratio: windows share few positions
    return ((torch.arange(count, dtype=torch.float64) + offset) * (length / count)).long()
