"""The torch twin of the quantised arithmetic: per-token activation codes and a linear layer that computes with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calibration.scheme import QuantLinear

__all__ = ["ActivationQuantizer", "FakeQuantLinear", "quantize_activation", "round_to"]

_TINY = 2.0**-118
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quantize_activation(x: Tensor, bits: int, symmetric: bool,
                        rounding: Callable[[Tensor], Tensor] = torch.round) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token codes, bit-equal to plugins.core.activation.quantize_activation.

    Args:
        x: [..., K], any float type; rows are tokens.
        bits: 2..8.
        symmetric: codes around 0 without a zero point.
        rounding: rounds half to even; training passes one with a straight-through gradient.

    Returns:
        codes [..., K], scale [..., 1], zero [..., 1], all fp32; the codes and the zero hold integers.
    """
    x = x.float()
    top = 2 ** (bits - 1) - 1
    if symmetric:
        amax = x.abs().amax(-1, keepdim=True)
        scale = amax.clamp(min=_TINY) / top + (amax - amax)  # NaN where the row has Inf or NaN
        codes = torch.clamp(rounding(x * (1.0 / scale)), -top, top)
        return codes, scale, torch.zeros_like(scale)
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    width = high - low
    scale = width.clamp(min=_TINY) / (2**bits - 1) + (width - width)
    reciprocal = 1.0 / scale
    zero = torch.clamp(rounding(-low * reciprocal) - (top + 1), -top - 1, top)
    codes = torch.clamp(rounding(x * reciprocal) + zero, -top - 1, top)
    return codes, scale, zero


def round_to(x: Tensor, dtype: str) -> Tensor:
    """x (fp32 or fp64) rounded to a dtype and back to fp32; finite 16-bit overflow is clamped as the kernels do."""
    if dtype not in _DTYPES:
        return x.float()
    limit = torch.finfo(_DTYPES[dtype]).max
    return x.clamp(-limit, limit).to(_DTYPES[dtype]).float()


class ActivationQuantizer:
    """Centred codes and scale of a tensor; remembers the last one, since q, k and v (or gate and up) read the same."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        self._bits, self._symmetric = bits, symmetric
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes - zero, scale) of x."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            codes, scale, zero = quantize_activation(x, self._bits, self._symmetric)
            self._last = (x, x._version, codes - zero, scale)
        return self._last[2], self._last[3]


class FakeQuantLinear(nn.Module):  # type: ignore[misc]
    """y = scale_x * sum_g scale_w[g] * ((codes_x - zero_x) (codes_w - zero_w)^T)[g] + b, in the kernels' order; A16 multiplies x itself.

    The products are integers held in fp32: exact, and equal to the kernels bit for bit, while partial sums stay below 2^24.

    Args:
        linear: integer codes and scales.
        quantizer: shared by the layers of a model; None for A16.
        dtype: the scheme's, to which the output is rounded; "float32" rounds nothing.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: QuantLinear, quantizer: ActivationQuantizer | None, dtype: str) -> None:
        super().__init__()
        bias = linear.arrays.bias
        integers, scale = linear.integers()
        self.register_buffer("weight", torch.from_numpy(linear.dequantize() if quantizer is None else integers))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))
        self.out_features, self.in_features = self.weight.shape
        self._quantizer, self._dtype = quantizer, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = x @ self.weight.T if self._quantizer is None else self._quantized(*self._quantizer(x))
        return round_to(y if self.bias is None else y + self.bias, self._dtype)

    def _quantized(self, codes: Tensor, scale: Tensor) -> Tensor:
        groups = self.scale.shape[1]
        parts = zip(codes.chunk(groups, -1), self.weight.chunk(groups, 1), self.scale.T, strict=True)
        y = torch.zeros((), dtype=torch.float32)
        for part, weight, weight_scale in parts:
            y = y + (part @ weight.T) * weight_scale
        return y * scale
