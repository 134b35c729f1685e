"""ABQGemm: any weight bits 1..8 with activation bits 2..8 (or 16), weights as bit planes in INT32
words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugins.abq_gemm import rounding
from plugins.abq_gemm.layout import WEIGHT_ONLY, WORD, padded_group, row_words
from plugins.core.activation import quantize_activation, rms_norm, saturate_cast
from plugins.core.code_sets import levels_with
from plugins.core.op_spec import (
    AffineForm,
    ArraySpec,
    GemmAttributes,
    GemmScheme,
    Grid,
    OpSpec,
    QuantArrays,
)
from plugins.core.packing import check_attributes, check_shapes
from plugins.errors import InputError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

__all__ = ["SPEC", "AbqGemm"]

INT8_RANGE = 128  # largest activation code in magnitude
_FP32_WHOLE = 1 << 23  # half the range in which fp32 holds every whole number


class AbqGemm(OpSpec):
    """Y = X W^T + b with W = scale * (q - zero) or scale * q + minimum, and X quantised per token;
    see README.md for formula and layout.
    """

    name = "ABQGemm"
    method = "abq"
    rank = 1  # it takes all bits: where no op for fewer takes them

    def objection(self, scheme: GemmScheme) -> tuple[str, str] | None:
        """Every code set, activations of 2 to 8 bits or none."""
        sets = levels_with(scheme.wbits)
        if not sets:
            return f"got {scheme.wbits} weight bits, expected 1 to 8", "Choose other --wbits"
        if scheme.abits != WEIGHT_ONLY and not 2 <= scheme.abits <= 8:
            return (
                f"got {scheme.abits} activation bits, expected 2 to 8, or 16 for weight-only",
                "Choose other --abits",
            )
        if scheme.levels not in sets:
            known = " or ".join(f"{levels} (W{codes.title})" for levels, codes in sets.items())
            return (
                f"got {scheme.levels} weight levels with {scheme.wbits} bits, expected {known}",
                "Quantise the layer again",
            )
        return None

    def check(self, attrs: GemmAttributes, where: str) -> None:
        """Raise InputError if this op cannot run these attributes."""
        check_attributes(self, attrs, where)
        largest = INT8_RANGE * (attrs.levels - 1) * attrs.group_len
        if attrs.abits != WEIGHT_ONLY and largest >= 1 << 31:
            raise InputError(
                where,
                f"got sums of up to {largest}, expected less than 2^31 for int32",
                "Use a smaller --group-size",
            )

    def input_names(self, attrs: GemmAttributes) -> list[str]:
        """X, weight, scale, zero or minimum and, if there are, bias and the norm's gamma."""
        return ["X", "weight", "scale", _offset(attrs), *attrs.optional_inputs]

    def arrays(self, attrs: GemmAttributes) -> tuple[ArraySpec, ...]:
        """Codes, scales and zero points or minimums of each group, bias."""
        rows, groups = attrs.out_features, attrs.n_groups
        return (
            ArraySpec("codes", "uint8", (rows, attrs.in_features), attrs.planes),
            ArraySpec("scale", "float32", (rows, groups)),
            ArraySpec(_offset(attrs), "float32" if attrs.has_minimum else "int32", (rows, groups)),
            *([ArraySpec("bias", "float32", (rows,))] if attrs.has_bias else []),
        )

    def pack(self, arrays: QuantArrays, attrs: GemmAttributes, where: str) -> dict[str, np.ndarray]:
        """Bit planes [planes, N, row_words] INT32, least significant bit first, and the scales,
        zeros or minimums and bias as they are.

        Raises:
            InputError: codes outside 0..levels-1, wrong shapes, scales or minimums that are not
                finite.
        """
        self.check(attrs, where)
        check_shapes(arrays, attrs, where, scale_columns=attrs.n_groups)
        codes, largest = arrays.codes, attrs.levels - 1
        if codes.dtype != np.uint8 or int(codes.max()) > largest:
            raise InputError(
                where,
                f"got codes {codes.dtype} up to {codes.max()}, expected uint8 0 to {largest}",
                "Quantise the layer again; codes are packed as they are, never re-derived",
            )
        offset = (_checked_minimum if attrs.has_minimum else _checked_zero)(arrays, attrs, where)
        rows, group_bits = attrs.out_features, padded_group(attrs)
        padded = np.zeros((rows, row_words(attrs) * WORD), np.uint8)
        used = padded[:, : attrs.n_groups * group_bits].reshape(rows, attrs.n_groups, group_bits)
        used[:, :, : attrs.group_len] = codes.reshape(rows, attrs.n_groups, attrs.group_len)
        words = np.empty((attrs.planes, rows, row_words(attrs)), "<i4")
        for plane in range(attrs.planes):
            bits = np.bitwise_and(padded, 1 << plane)  # packbits counts any non-zero byte as 1
            words[plane] = np.packbits(bits, axis=1, bitorder="little").view("<i4")
        packed = {
            "weight": words,
            "scale": arrays.scale.astype(np.float32),
            _offset(attrs): offset,
        }
        return packed | (
            {"bias": arrays.bias.astype(np.float32)} if arrays.bias is not None else {}
        )

    def unpack(self, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes) -> QuantArrays:
        """Inverse of pack()."""
        rows, group_bits = attrs.out_features, padded_group(attrs)
        codes = np.zeros((rows, attrs.in_features), np.uint8)
        for plane in range(attrs.planes):
            words = np.ascontiguousarray(tensors["weight"][plane])
            bits = np.unpackbits(words.view(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
            bits = bits[:, : attrs.n_groups * group_bits].reshape(rows, attrs.n_groups, group_bits)[
                :, :, : attrs.group_len
            ]
            codes |= bits.reshape(rows, -1) << plane
        offset = tensors[_offset(attrs)]
        zero, minimum = (None, offset) if attrs.has_minimum else (offset, None)
        return QuantArrays(codes, tensors["scale"], zero, bias=tensors.get("bias"), minimum=minimum)

    def integers(self, arrays: QuantArrays, attrs: GemmAttributes) -> tuple[np.ndarray, np.ndarray]:
        """q - zero, or q where there is a minimum, as fp32 [N, K], and scale fp32 [N, n_groups]."""
        groups = arrays.codes.reshape(attrs.out_features, attrs.n_groups, attrs.group_len).astype(
            np.float32
        )
        if arrays.zero is None:
            pass
        elif np.abs(arrays.zero).max() < _FP32_WHOLE:  # both numbers and their difference are exact
            groups -= arrays.zero[..., None].astype(np.float32)
        else:
            groups = (groups - arrays.zero[..., None].astype(np.float64)).astype(np.float32)
        return groups.reshape(attrs.out_features, attrs.in_features), arrays.scale.astype(
            np.float32
        )

    def affine(self, scheme: GemmScheme) -> AffineForm | None:
        """The op's own formula, with zero points."""
        return None if scheme.has_minimum else AffineForm(scheme.planes, False, scheme.group_size)

    def reference(
        self, x: np.ndarray, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes
    ) -> np.ndarray:
        """Y [..., N] in x's dtype: exact integers per group, then fp32 in the kernel's order."""
        arrays = self.unpack(tensors, attrs)
        rows = (rms_norm(x, tensors["gamma"], attrs.norm_epsilon) if attrs.has_norm else x).reshape(
            -1, attrs.in_features
        )
        with np.errstate(over="ignore", invalid="ignore"):
            y = (
                self._weight_only(rows, arrays, attrs)
                if attrs.abits == WEIGHT_ONLY
                else self._integer(rows, arrays, attrs)
            )
            if arrays.bias is not None:
                y = y + arrays.bias.astype(np.float32)
        return saturate_cast(y, x.dtype).reshape(*x.shape[:-1], attrs.out_features)

    def _weight_only(self, x: np.ndarray, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
        """fp64 inside: the kernel's fp32 sum is compared with a tolerance."""
        codes = arrays.codes.reshape(attrs.out_features, attrs.n_groups, attrs.group_len).astype(
            np.float64
        )
        if arrays.zero is not None:
            codes -= arrays.zero[..., None]
        weight = codes * arrays.scale[..., None].astype(np.float64)
        if arrays.minimum is not None:
            weight += arrays.minimum[..., None].astype(np.float64)
        return np.asarray(
            x.astype(np.float64) @ weight.reshape(attrs.out_features, -1).T, np.float32
        )

    def _integer(self, x: np.ndarray, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
        codes, scale, zero = quantize_activation(x, attrs.abits, bool(attrs.act_symmetric))
        y: np.ndarray = np.zeros((len(x), attrs.out_features), np.float32)
        for group in range(attrs.n_groups):
            part = slice(group * attrs.group_len, (group + 1) * attrs.group_len)
            a, q = codes[:, part].astype(np.float64), arrays.codes[:, part].astype(np.float64)
            product = (a @ q.T).astype(np.int64)  # exact: below 2^31 by check()
            row_sum, column_sum = (
                a.sum(1).astype(np.int64)[:, None],
                q.sum(1).astype(np.int64)[None, :],
            )
            zx = zero.astype(np.int64)
            token_sum = row_sum - attrs.group_len * zx  # of a - z
            integer = product - zx * column_sum
            if arrays.zero is not None:
                integer -= token_sum * arrays.zero[:, group].astype(np.int64)[None, :]
            term = integer.astype(np.float32) * arrays.scale[:, group].astype(np.float32)[None, :]
            if arrays.minimum is not None:
                term = term + token_sum.astype(np.float32) * arrays.minimum[:, group][None, :]
            y = y + term
        y *= scale
        return y

    def function_body(self, attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
        """Local function of standard ops; see plugins/abq_gemm/body.py."""
        from plugins.abq_gemm.body import function_body

        return function_body(attrs, self.input_names(attrs), dtype, domain)

    def unpacked_bytes(self, scheme: GemmScheme) -> int:
        """By the number of planes; see plugins/abq_gemm/body.py."""
        from plugins.abq_gemm.body import unpacked_bytes

        return unpacked_bytes(scheme)

    def search_grid(
        self, groups: Tensor, importance: Tensor, ratios: Sequence[float], scheme: GemmScheme
    ) -> Grid:
        """See plugins/abq_gemm/grid.py."""
        from plugins.abq_gemm.grid import search

        return search(groups, importance, ratios, scheme.levels)

    def grid_from_arrays(
        self, arrays: QuantArrays, scheme: GemmScheme, device: str = "cpu"
    ) -> Grid:
        """Their scales and zero points; there is no search for minimums."""
        from plugins.abq_gemm.grid import grid_from_arrays

        return grid_from_arrays(arrays, scheme.levels, device)

    def round_plain(self, weight: np.ndarray, scheme: GemmScheme) -> QuantArrays:
        """See plugins/abq_gemm/rounding.py."""
        return rounding.round_plain(weight, scheme)

    def rounding_bound(self, weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
        """See plugins/abq_gemm/rounding.py."""
        return rounding.rounding_bound(weight, scheme)


def _offset(attrs: GemmAttributes) -> str:
    """Where code 0 lies: the name of the array that says it."""
    return "minimum" if attrs.has_minimum else "zero"


def _checked_minimum(arrays: QuantArrays, attrs: GemmAttributes, where: str) -> np.ndarray:
    """Minimums as they are; check_shapes has seen that they are finite."""
    minimum, shape = arrays.minimum, arrays.scale.shape
    if minimum is None or minimum.shape != shape or minimum.dtype != np.float32:
        got = (
            "no minimums"
            if minimum is None
            else f"minimums {minimum.dtype} of shape {minimum.shape}"
        )
    elif arrays.zero is not None:
        got = "zero points beside the minimums"
    else:
        return minimum
    raise InputError(
        where, f"got {got}, expected fp32 minimums of shape {shape}", "Quantise the layer again"
    )


def _checked_zero(arrays: QuantArrays, attrs: GemmAttributes, where: str) -> np.ndarray:
    """Zero points as int32; refuse those that do not fit, or for which the ONNX body's fp64 sums
    would not be exact.
    """
    zero, shape = arrays.zero, arrays.scale.shape
    if zero is None or zero.shape != shape or zero.dtype.kind not in "iu":
        got = (
            "no zero points" if zero is None else f"zero points {zero.dtype} of shape {zero.shape}"
        )
        raise InputError(
            where, f"got {got}, expected integers of shape {shape}", "Quantise the layer again"
        )
    longest = (
        2 * INT8_RANGE * attrs.group_len
    )  # |sum of a - zero point| over a group stays below this
    largest = min((1 << 31) - 1, (1 << 52) // longest)
    low, high = int(zero.min()), int(zero.max())
    if low < -largest - 1 or high > largest:
        raise InputError(
            where,
            f"got zero points from {low} to {high}, expected {-largest - 1} to {largest}",
            "Quantise the layer again with ranges that reach closer to 0",
        )
    return zero.astype(np.int32)


SPEC = AbqGemm()
