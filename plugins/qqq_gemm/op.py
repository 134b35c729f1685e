"""QQQGemm: W4A8 with two-level scales, weights as nibbles in the order of the int8 tensor-core
fragment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugins.core.activation import quantize_activation, rms_norm, saturate_cast
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
from plugins.qqq_gemm import rounding
from plugins.qqq_gemm.layout import (
    HIGHEST,
    INT8_MAX,
    LOWEST,
    OFFSET,
    TILE_K,
    TILE_N,
    nibble_order,
    padded_shape,
)

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

__all__ = ["SPEC", "QqqGemm"]

GROUP_SIZES = (0, 64, 128)


class QqqGemm(OpSpec):
    """Y = X W^T + b with W = scale * w8, w8 = q or round(q * scale_group), X int8 per token; see
    README.md.
    """

    name = "QQQGemm"
    method = "qqq"
    rank = 0  # made for these bits: before an op for all
    act_symmetric = True
    published = "qqq"

    def objection(self, scheme: GemmScheme) -> tuple[str, str] | None:
        """W4A8 with symmetric activations, in groups of GROUP_SIZES."""
        if scheme.has_minimum:
            return "got weights with minimums, expected symmetric ones", "Use --method abq"
        if (scheme.wbits, scheme.levels, scheme.abits, scheme.act_symmetric) != (4, 16, 8, 1):
            codes = "" if scheme.act_symmetric else " with asymmetric activations"
            return (
                f"got {scheme.title}{codes}, expected W4A8 with symmetric activations",
                "Use --wbits 4 --abits 8, or --method abq for other bits",
            )
        if scheme.group_size not in GROUP_SIZES:
            return (
                f"got group size {scheme.group_size}, expected 0, 64 or 128",
                "Use one of these, or --method abq",
            )
        return None

    def check(self, attrs: GemmAttributes, where: str) -> None:
        """Raise InputError if this op cannot run these attributes."""
        check_attributes(self, attrs, where)
        if INT8_MAX * INT8_MAX * attrs.in_features >= 1 << 31:
            most = ((1 << 31) - 1) // INT8_MAX**2
            raise InputError(
                where,
                f"got in_features {attrs.in_features}, expected at most {most}: the int32 sum would "
                "overflow",
                "Use --method abq with a group size",
            )

    def input_names(self, attrs: GemmAttributes) -> list[str]:
        """X, weight, scale, per group scale_group and, if there are, bias and the norm's gamma."""
        return [
            "X",
            "weight",
            "scale",
            *(["scale_group"] if attrs.group_size else []),
            *attrs.optional_inputs,
        ]

    def arrays(self, attrs: GemmAttributes) -> tuple[ArraySpec, ...]:
        """Codes, channel scales, per group their scales, bias."""
        rows, groups = attrs.out_features, attrs.n_groups
        return (
            ArraySpec("codes", "int8", (rows, attrs.in_features), attrs.wbits),
            ArraySpec("scale", "float32", (rows, 1)),
            *([ArraySpec("scale_group", "float16", (rows, groups))] if attrs.group_size else []),
            *([ArraySpec("bias", "float32", (rows,))] if attrs.has_bias else []),
        )

    def pack(self, arrays: QuantArrays, attrs: GemmAttributes, where: str) -> dict[str, np.ndarray]:
        """Nibbles as INT32 [K/16, 2N] (K, N padded to 16, 64), scale [N, 1] fp32, scale_group
        [n_groups, N] fp16, bias.

        Raises:
            InputError: codes outside -8..7, wrong shapes, scales that are not finite.
        """
        self.check(attrs, where)
        check_shapes(arrays, attrs, where, scale_columns=1)
        low, high = int(arrays.codes.min()), int(arrays.codes.max())
        if arrays.codes.dtype != np.int8 or low < LOWEST or high > HIGHEST:
            raise InputError(
                where,
                f"got codes {arrays.codes.dtype} {low} to {high}, expected int8 {LOWEST} to {HIGHEST}",
                "Quantise the layer again; codes are packed as they are, never re-derived",
            )
        group_shape = None if arrays.scale_group is None else arrays.scale_group.shape
        expected = (attrs.out_features, attrs.n_groups) if attrs.group_size else None
        if group_shape != expected:
            raise InputError(
                where,
                f"got group scales of shape {group_shape}, expected {expected}",
                "Quantise the layer again",
            )
        packed = {
            "weight": self._pack_nibbles(arrays.codes, attrs),
            "scale": arrays.scale.astype(np.float32),
        }
        if arrays.scale_group is not None:
            packed["scale_group"] = np.ascontiguousarray(arrays.scale_group.T.astype(np.float16))
        return packed | (
            {"bias": arrays.bias.astype(np.float32)} if arrays.bias is not None else {}
        )

    def _pack_nibbles(self, codes: np.ndarray, attrs: GemmAttributes) -> np.ndarray:
        rows, columns = padded_shape(attrs)
        grouped = bool(attrs.group_size)
        nibbles = np.full((rows, columns), OFFSET if grouped else 0, np.uint8)
        unsigned = codes.view(np.uint8)
        nibbles[: attrs.out_features, : attrs.in_features] = (
            unsigned + np.uint8(OFFSET) if grouped else unsigned & np.uint8(15)
        )
        # [nb, j, b, lane / 4, kt, lane % 4, r]: n = 64 nb + 16 j + 8 b + lane / 4, k = 16 kt + 4
        # (lane % 4) + r
        tiles = nibbles.reshape(rows // TILE_N, 4, 2, 8, columns // TILE_K, 4, 4)
        order = nibble_order(grouped)
        words = np.empty(
            (columns // TILE_K, rows // TILE_N, 8, 4, 4, 4), np.uint8
        )  # [kt, nb, lane / 4, lane % 4, j, byte]
        for byte in range(4):
            (b_low, r_low), (b_high, r_high) = order[2 * byte], order[2 * byte + 1]
            # [nb, j, lane / 4, kt, lane % 4]
            both = tiles[:, :, b_low, :, :, :, r_low] | (tiles[:, :, b_high, :, :, :, r_high] << 4)
            words[..., byte] = both.transpose(3, 0, 2, 4, 1)
        return words.reshape(columns // TILE_K, -1).view("<i4")

    def unpack(self, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes) -> QuantArrays:
        """Inverse of pack()."""
        rows, columns = padded_shape(attrs)
        grouped = bool(attrs.group_size)
        words = (
            np.ascontiguousarray(tensors["weight"])
            .view(np.uint8)
            .reshape(columns // TILE_K, rows // TILE_N, 8, 4, 4, 4)
        )
        tiles = np.empty((rows // TILE_N, 4, 2, 8, columns // TILE_K, 4, 4), np.uint8)
        for nibble, (b, r) in enumerate(nibble_order(grouped)):
            value = (words[..., nibble // 2] >> (4 * (nibble % 2))) & 15
            tiles[:, :, b, :, :, :, r] = value.transpose(1, 4, 2, 0, 3)
        signed = (
            tiles.astype(np.int8) - np.int8(OFFSET)
            if grouped
            else ((tiles ^ 8).astype(np.int8) - np.int8(8))
        )
        codes = np.ascontiguousarray(
            signed.reshape(rows, columns)[: attrs.out_features, : attrs.in_features]
        )
        group = np.ascontiguousarray(tensors["scale_group"].T) if grouped else None
        return QuantArrays(codes, tensors["scale"], None, group, tensors.get("bias"))

    def int8_weights(self, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
        """The int8 weights that the tensor core multiplies, [N, K]: q, or round(q * scale_group)
        per group (half to even).
        """
        if arrays.scale_group is None:
            return arrays.codes
        groups = arrays.codes.reshape(attrs.out_features, attrs.n_groups, attrs.group_len).astype(
            np.float32
        )
        products = np.rint(groups * arrays.scale_group[..., None].astype(np.float32))
        return (
            np.clip(products, -INT8_MAX, INT8_MAX)
            .astype(np.int8)
            .reshape(attrs.out_features, attrs.in_features)
        )

    def integers(self, arrays: QuantArrays, attrs: GemmAttributes) -> tuple[np.ndarray, np.ndarray]:
        """int8_weights as fp32 [N, K], and the channel scale fp32 [N, 1]: the re-rounding to int8 is
        part of the numbers.
        """
        return self.int8_weights(arrays, attrs).astype(np.float32), arrays.scale.astype(np.float32)

    def affine(self, scheme: GemmScheme) -> AffineForm:
        """Per group int8 weights with one scale per channel: the second level has no other name."""
        return AffineForm(8 if scheme.group_size else scheme.wbits, True, 0)

    def from_affine(self, arrays: QuantArrays, scheme: GemmScheme, where: str) -> QuantArrays:
        """Codes per output channel, less the zero point of symmetric ones."""
        if arrays.zero is None or (arrays.zero != OFFSET).any():
            raise InputError(
                where,
                f"got zero points other than {OFFSET}, expected those of symmetric codes",
                "Use --method abq, or --abits 16 to keep such codes",
            )
        signed = (arrays.codes - np.uint8(OFFSET)).view(np.int8)
        return QuantArrays(signed, arrays.scale, bias=arrays.bias)

    def reference(
        self, x: np.ndarray, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes
    ) -> np.ndarray:
        """Y [..., N] in x's dtype: exact integers, then fp32 in the kernel's order."""
        arrays = self.unpack(tensors, attrs)
        rows = (rms_norm(x, tensors["gamma"], attrs.norm_epsilon) if attrs.has_norm else x).reshape(
            -1, attrs.in_features
        )
        codes, scale, _ = quantize_activation(rows, 8, True)
        weight = self.int8_weights(arrays, attrs).astype(np.float64)
        integer = codes.astype(np.float64) @ weight.T  # exact: below 2^31 by check()
        with np.errstate(over="ignore", invalid="ignore"):
            y = (
                integer.astype(np.int64).astype(np.float32) * arrays.scale.astype(np.float32).T
            ) * scale
            if arrays.bias is not None:
                y = y + arrays.bias.astype(np.float32)
        return saturate_cast(y, x.dtype).reshape(*x.shape[:-1], attrs.out_features)

    def function_body(self, attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
        """Local function of standard ops; see plugins/qqq_gemm/body.py."""
        from plugins.qqq_gemm.body import function_body

        return function_body(attrs, dtype, domain)

    def unpacked_bytes(self, scheme: GemmScheme) -> int:
        """More per group, where int8 weights are made by way of fp32."""
        from plugins.qqq_gemm.body import unpacked_bytes

        return unpacked_bytes(scheme)

    def search_grid(
        self, groups: Tensor, importance: Tensor, ratios: Sequence[float], scheme: GemmScheme
    ) -> Grid:
        """See plugins/qqq_gemm/grid.py."""
        from plugins.qqq_gemm.grid import search

        return search(groups, importance, ratios, bool(scheme.group_size))

    def grid_from_arrays(
        self, arrays: QuantArrays, scheme: GemmScheme, device: str = "cpu"
    ) -> Grid:
        """Their scales of both levels."""
        from plugins.qqq_gemm.grid import grid_from_arrays

        return grid_from_arrays(arrays, device)

    def round_plain(self, weight: np.ndarray, scheme: GemmScheme) -> QuantArrays:
        """See plugins/qqq_gemm/rounding.py."""
        return rounding.round_plain(weight, scheme)

    def rounding_bound(self, weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
        """See plugins/qqq_gemm/rounding.py."""
        return rounding.rounding_bound(weight, scheme)


SPEC = QqqGemm()
