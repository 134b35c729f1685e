"""What a custom op is: its inputs, its packing, its numpy truth and its body of standard ONNX ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["DOMAIN", "GemmAttributes", "OpSpec", "PLUGIN_VERSION", "QuantArrays", "is_custom"]

# TensorRT plugin namespace and ONNX domain; further schemes have domains below it, "anybit.v1"
DOMAIN = "anybit"
PLUGIN_VERSION = "1"


def is_custom(domain: str) -> bool:
    """Whether a node of this ONNX domain is one of ours."""
    return domain == DOMAIN or domain.startswith(f"{DOMAIN}.")


@dataclass(frozen=True)
class GemmAttributes:
    """Attributes of a low-bit GEMM node; the plugin reads the same names as its fields.

    Attributes:
        wbits: nominal weight bits, 1..8.
        levels: number of weight codes: 2**wbits, or 5 (W2*) and 3 (W1*) for the balanced sets.
        abits: activation bits, 2..8, or 16 for weight-only.
        act_symmetric: 1 for symmetric per-token activation codes, 0 for asymmetric ones.
        group_size: input channels that share a weight scale; 0 means the whole row (per channel).
        in_features: K, length of a weight row.
        out_features: N, number of weight rows.
        has_bias: 1 if there is a bias.
        norm_epsilon: of the RMSNorm of X, whose gamma is then the last input; 0 means no norm.
    """

    wbits: int
    levels: int
    abits: int
    act_symmetric: int
    group_size: int
    in_features: int
    out_features: int
    has_bias: int
    norm_epsilon: float = 0.0

    @property
    def n_groups(self) -> int:
        """Weight scales per output channel."""
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def group_len(self) -> int:
        """Input channels per scale: group_size, or K when per channel."""
        return self.group_size or self.in_features

    @property
    def planes(self) -> int:
        """Bit planes that hold the codes 0..levels-1."""
        return (self.levels - 1).bit_length()

    @property
    def has_norm(self) -> bool:
        """Whether X goes through an RMSNorm first."""
        return self.norm_epsilon > 0

    @property
    def optional_inputs(self) -> list[str]:
        """The inputs that come last in every op: bias, fp32 [N], and gamma, [K] of X's type."""
        return [*(["bias"] if self.has_bias else []), *(["gamma"] if self.has_norm else [])]

    def as_dict(self) -> dict[str, int | float]:
        """The attributes by name, as written into the ONNX node."""
        return asdict(self)


@dataclass(frozen=True)
class QuantArrays:
    """Unpacked weights of one linear layer (or of several fused along N), as numpy arrays.

    Attributes:
        codes: [N, K] integer codes; uint8 0..levels-1 for ABQGemm, int8 -8..7 for QQQGemm.
        scale: ABQGemm: fp32 [N, n_groups]. QQQGemm: fp32 [N, 1], the channel scale.
        zero: ABQGemm: int32 [N, n_groups], in code units, may lie outside the code range. QQQGemm:
            None.
        scale_group: QQQGemm per group: fp16 [N, n_groups], second-level scale in int8 units. Else
            None.
        bias: fp32 [N] or None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    scale_group: np.ndarray | None = None
    bias: np.ndarray | None = None


class OpSpec(Protocol):
    """One custom op. Each op folder's op.py defines an object SPEC that satisfies this."""

    name: str  # ONNX op_type and TensorRT plugin name

    def check(self, attrs: GemmAttributes, where: str) -> None:
        """Raise InputError if this op cannot run these attributes."""

    def input_names(self, attrs: GemmAttributes) -> list[str]:
        """Formal inputs in order; the first is "X", the others but gamma are keys of pack()'s
        result.
        """

    def pack(self, arrays: QuantArrays, attrs: GemmAttributes, where: str) -> dict[str, np.ndarray]:
        """Initializers by input name, in the layout the kernels read. Raises InputError on bad
        codes.
        """

    def unpack(self, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes) -> QuantArrays:
        """Inverse of pack()."""

    def dequantize(self, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
        """The real numbers that the codes stand for, fp32 [N, K]."""

    def integers(self, arrays: QuantArrays, attrs: GemmAttributes) -> tuple[np.ndarray, np.ndarray]:
        """What the kernel multiplies activation codes with: integers as fp32 [N, K], and the scale
        fp32 [N, G] of each of G groups.
        """

    def reference(
        self, x: np.ndarray, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes
    ) -> np.ndarray:
        """Y [..., N] in x's dtype (fp16, bf16 of ml_dtypes, or fp32) from x [..., K], packed
        tensors and gamma.
        """

    def function_body(self, attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
        """Local function of standard ops computing the same integers; dtype is onnx.TensorProto.*.

        The body takes in_features and out_features from the node's attributes, so one function
        serves every layer of a model that has the same scheme.
        """
