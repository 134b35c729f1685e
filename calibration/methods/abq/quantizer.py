"""Differentiable fake quantisation: the integer codes and scales that inference runs, with
gradients to weights, clips and activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibration.reference.fake_quant import fake_quantize
from plugins.core.op_spec import QuantArrays
from plugins.core.rounding import SMALLEST_SCALE

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["WeightQuantizer", "quantize_dequantize_activation"]

_GAMMA = 4.0  # the paper's start of a clip parameter, sigmoid(4) = 0.982 of the range
_FLAT = (
    2.0**-15
)  # least step as a part of the group's absmax: zero points keep to 16 bits, as in round-to-nearest
_RATIO, _TRIALS = (
    0.9,
    22,
    # tried clips: 0.982 * 0.9^k down to 0.097, where two levels of a long Gaussian row have their best
)


class _Round(torch.autograd.Function):  # type: ignore[misc]
    """Round half to even whose gradient is that of the identity (straight-through)."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient


def _round(x: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x)
    return rounded


def quantize_dequantize_activation(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x [..., K] as its per-token codes stand for it, (codes - zero) * scale in fp32; the gradient
    goes through x and its range.

    Args:
        bits: 2..8; 16 returns x itself.
        symmetric: codes around 0 without a zero point.
    """
    return fake_quantize(x, bits, symmetric, _round)


class WeightQuantizer(nn.Module):  # type: ignore[misc]
    """Asymmetric weight codes of one linear with learnable clipping (OmniQuant's LWC, which ABQ-LLM
    takes over).

    Of each group of a row: high = sigmoid(gamma_high) * max w, low = sigmoid(gamma_low) * min w,
    scale = (high - low) / (levels - 1), zero = round(-low / scale), q = clamp(round(w / scale) +
    zero, 0, levels - 1), and the weight becomes scale * (q - zero). W2* is 5 levels and W1* is 3.
    The range need not hold 0, so the zero may lie outside the codes.

    Args:
        shape: [N, K] of the weight.
        scheme: of ABQGemm; its levels and group size.
    """

    def __init__(self, shape: tuple[int, int], scheme: QuantScheme) -> None:
        super().__init__()
        self._top, self._group = scheme.levels - 1, scheme.group_size or shape[1]
        ranges = (shape[0], shape[1] // self._group)
        self.gamma_high = nn.Parameter(torch.full(ranges, _GAMMA))
        self.gamma_low = nn.Parameter(torch.full(ranges, _GAMMA))

    def forward(self, weight: Tensor) -> Tensor:
        """[N, K] fp32 -> the same, fake quantised."""
        integers, scale, _ = self._integers(weight)
        return (integers * scale).flatten(1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def search(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Start the clips at the smallest squared error of each group, one ratio for both ends.

        The paper's start keeps nearly the whole range. At 2 or 3 levels that rounds nearly all
        weights to 0, and at 2 or 3 bits the best clip is further away than a short training gets.

        Args:
            weight: [N, K].
            importance: [K], mean square of the linear's input; None weighs all columns alike.
        """
        columns = torch.ones_like(weight[0]) if importance is None else importance
        start = torch.full_like(self.gamma_high, _GAMMA)
        best, best_error = start.clone(), torch.full_like(start, torch.inf)
        for trial in range(_TRIALS):
            gamma = torch.logit(torch.sigmoid(start) * _RATIO**trial)
            self.gamma_high.copy_(gamma)
            self.gamma_low.copy_(gamma)
            error = self._grouped((self(weight) - weight).square_().mul_(columns)).sum(-1)
            better = error < best_error
            best, best_error = (
                torch.where(better, gamma, best),
                torch.where(better, error, best_error),
            )
        self.gamma_high.copy_(best)
        self.gamma_low.copy_(best)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def arrays(self, weight: Tensor, bias: Tensor | None = None) -> QuantArrays:
        """Codes, scales and zero points of [N, K]; dequantised they are forward(weight), bit for
        bit.
        """
        integers, scale, zero = self._integers(weight)
        codes = (integers + zero).flatten(1)
        return QuantArrays(
            codes.to(torch.uint8).cpu().numpy(),
            scale[..., 0].cpu().numpy(),
            zero[..., 0].to(torch.int32).cpu().numpy(),
            None,
            None if bias is None else bias.float().cpu().numpy(),
        )

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, self._group))

    def _integers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q - zero [N, G, group], scale and zero [N, G, 1]."""
        groups = self._grouped(weight)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        floor = (torch.maximum(-low, high).detach() * _FLAT).clamp(
            min=SMALLEST_SCALE
        )  # normal in fp32, where 1e-5 would not be small
        low, high = (
            torch.sigmoid(self.gamma_low)[..., None] * low,
            torch.sigmoid(self.gamma_high)[..., None] * high,
        )
        scale = torch.maximum(high / self._top - low / self._top, floor)
        zero = _round(-low / scale)
        return torch.clamp(_round(groups / scale), -zero, self._top - zero), scale, zero
