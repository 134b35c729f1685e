"""The torch twin of the quantised arithmetic: per-token activation codes and a linear layer that
computes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from calibration.quant.scheme import FLOAT_BITS, QuantLinear

__all__ = [
    "Activation",
    "ActivationQuantizer",
    "FakeQuantLinear",
    "FakeQuantize",
    "fake_quantize",
    "integer_product",
    "quantize_activation",
    "quantize_cache",
    "round_to",
]

_TINY = 2.0**-118
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quantize_activation(
    x: Tensor, bits: int, symmetric: bool, rounding: Callable[[Tensor], Tensor] = torch.round
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token codes, bit-equal to plugins.core.activation.quantize_activation.

    Args:
        x: [..., K], any float type; rows are tokens.
        bits: 2..8.
        symmetric: codes around 0 without a zero point.
        rounding: rounds half to even; training passes one with a straight-through gradient.

    Returns:
        codes [..., K], scale [..., 1], zero [..., 1], all fp32; the codes and the zero hold
        integers.
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


def fake_quantize(
    x: Tensor, bits: int, symmetric: bool, rounding: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """x [..., K] as its per-token codes stand for it, (codes - zero) * scale in fp32; 16 bits
    return x itself.
    """
    if bits >= FLOAT_BITS:
        return x
    codes, scale, zero = quantize_activation(x, bits, symmetric, rounding)
    return (codes - zero) * scale


FakeQuantize = Callable[
    [Tensor, int, bool], Tensor
]  # fake_quantize, or training's, which has a gradient


def quantize_cache(x: Tensor, bits: int, quantize: FakeQuantize = fake_quantize) -> Tensor:
    """Keys (after RoPE) or values [..., head_dim] as a cache of these bits gives them back:
    asymmetric codes per token and head.

    The one definition for training, calibration and the torch reference; exporter/graph/nodes.py
    writes the same into the graph.
    """
    return quantize(x, bits, False)


def round_to(x: Tensor, dtype: str) -> Tensor:
    """x (fp32 or fp64) rounded to a dtype and back to fp32; finite 16-bit overflow is clamped as
    the kernels do.
    """
    if dtype not in _DTYPES:
        return x.float()
    limit = torch.finfo(_DTYPES[dtype]).max
    return x.clamp(-limit, limit).to(_DTYPES[dtype]).float()


@dataclass(frozen=True)
class Activation:
    """A linear's input as the kernel sees it: x ~ scale * (codes - zero).

    Attributes:
        codes: int8 [..., K]; with A16 x itself, and no scale.
        scale: fp32 [..., 1] or None.
        zero: fp32 [..., 1] holding integers; None if symmetric.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, bits: int, symmetric: bool) -> Activation:
        """Quantise x [..., K]; 16 bits leave it as it is."""
        if bits >= 16:
            return cls(x)
        codes, scale, zero = quantize_activation(x, bits, symmetric)
        return cls(codes.to(torch.int8), scale, None if symmetric else zero)

    def values(self) -> Tensor:
        """What the codes stand for, fp32 [..., K]."""
        if self.scale is None:
            return self.codes.float()
        return (self.codes.float() if self.zero is None else self.codes - self.zero) * self.scale


class ActivationQuantizer:
    """Quantises a tensor; remembers the last one, since q, k and v (or gate and up) read the same."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        self._bits, self._symmetric = bits, symmetric
        self._last: tuple[Tensor, int, Activation] | None = None

    def __call__(self, x: Tensor) -> Activation:
        """x as the kernel sees it."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = (x, x._version, Activation.of(x, self._bits, self._symmetric))
        return self._last[2]


@cache
def _exact_int8() -> bool:
    """Whether torch's int8 product on this CPU is exact: without VNNI some libraries saturate pairs
    of products to 16 bits.
    """
    a, b = torch.full((32, 64), -128, dtype=torch.int8), torch.full((64, 32), 127, dtype=torch.int8)
    try:
        return bool(
            (torch._int_mm(a, b) == -128 * 127 * 64).all()
            and (torch._int_mm(b.T.contiguous(), b) == 127 * 127 * 64).all()
        )
    except RuntimeError:
        return False


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [..., K] times weight int8 [N, K]: int32 [..., N]."""
    if codes.device.type == "cpu" and _exact_int8():
        return torch._int_mm(codes.reshape(-1, codes.shape[-1]), weight.T).unflatten(
            0, codes.shape[:-1]
        )
    wide = (
        torch.float32 if codes.shape[-1] << 14 <= 1 << 24 else torch.float64
    )  # every partial sum is exact
    return (codes.to(wide) @ weight.to(wide).T).to(torch.int32)


class FakeQuantLinear(nn.Module):  # type: ignore[misc]
    """y = scale_x * sum_g scale_w[g] * ((codes_x - zero_x) (codes_w - zero_w)^T)[g] + b, in the
    kernels' order; A16 multiplies x itself. With minimums in the place of zero_w, a group adds
    minimum[g] * sum (codes_x - zero_x).

    The products are whole numbers, equal to the kernels' bit for bit.

    Args:
        linear: integer codes and scales.
        quantizer: shared by a model's layers of these activation bits; None for A16.
        dtype: the scheme's, to which the output is rounded; "float32" rounds nothing.
        exact: False takes one fp32 product where there is a scale per group: the same numbers up to
            fp32 rounding, several times as fast.
    """

    weight: Tensor  # int8 around `offset`, or fp32 for A16 and for ranges beyond int8
    offset: Tensor | None  # [N, G] int32, of asymmetric weights that do not fit int8 as they are
    scale: Tensor
    minimum: Tensor | None  # [N, G]
    bias: Tensor | None

    def __init__(
        self,
        linear: QuantLinear,
        quantizer: ActivationQuantizer | None,
        dtype: str = "float32",
        exact: bool = True,
    ) -> None:
        super().__init__()
        bias, minimum = linear.arrays.bias, linear.arrays.minimum
        integers, scale = linear.integers()
        self._floats = quantizer is None or not (exact or scale.shape[1] == 1)
        weight, offset = torch.from_numpy(linear.dequantize() if self._floats else integers), None
        if not self._floats:
            weight, offset = _int8_and_offset(weight, scale.shape[1])
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("minimum", None if minimum is None else torch.tensor(minimum))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))
        self.out_features, self.in_features = self.weight.shape
        self._quantizer, self._dtype = quantizer, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.multiply(Activation(x) if self._quantizer is None else self._quantizer(x))

    def multiply(self, x: Activation) -> Tensor:
        """The product with an input that is quantised already."""
        assert x.scale is not None or self._floats, "float inputs to integer weights"
        y = x.values() @ self.weight.T if self._floats else self._quantized(x) * x.scale
        return round_to(y if self.bias is None else y + self.bias, self._dtype)

    def _quantized(self, x: Activation) -> Tensor:
        groups = self.scale.shape[1]
        parts = zip(
            x.codes.chunk(groups, -1), self.weight.chunk(groups, 1), self.scale.T, strict=True
        )
        y = torch.zeros((), dtype=torch.float32)
        for group, (codes, weight, weight_scale) in enumerate(parts):
            term = self._integers(codes, weight, x.zero, group) * weight_scale
            if self.minimum is not None:
                term = term + _code_sums(codes, x.zero).float() * self.minimum[:, group]
            y = y + term
        return y

    def _integers(self, codes: Tensor, weight: Tensor, zero: Tensor | None, group: int) -> Tensor:
        if weight.dtype != torch.int8:
            return (codes.float() if zero is None else codes - zero) @ weight.T
        product = integer_product(codes, weight)
        zeros = None if zero is None else zero.to(torch.int32)
        if zeros is not None:
            product -= zeros * weight.sum(-1, dtype=torch.int32)
        if self.offset is not None:
            product += _code_sums(codes, zero) * self.offset[:, group]
        return product.float()


def _code_sums(codes: Tensor, zero: Tensor | None) -> Tensor:
    """sum (codes - zero) over the last axis, int32 [..., 1]."""
    total = codes.sum(-1, keepdim=True, dtype=torch.int32)
    return total if zero is None else total - zero.to(torch.int32) * codes.shape[-1]


def _int8_and_offset(integers: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
    """Whole numbers [N, K] as int8 plus an offset per row and group, if they have one; else as they
    are.
    """
    if integers.min() >= -128 and integers.max() <= 127:
        return integers.to(torch.int8), None
    parts = integers.unflatten(1, (groups, -1))
    offset = torch.floor((parts.amin(-1) + parts.amax(-1) + 1) / 2)
    around = parts - offset[..., None]
    int32 = (1 << 22) // parts.shape[-1]  # offset * sum of codes stays below 2^30
    if around.min() < -128 or around.max() > 127 or offset.abs().max() >= int32:
        return integers, None
    return around.flatten(1).to(torch.int8), offset.to(torch.int32)
