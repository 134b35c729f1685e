"""How a model is quantised, and one linear layer's integer codes with the numbers they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibration.out.records import Dtype
from plugins import op_spec
from plugins.core.code_sets import CodeSet, code_set
from plugins.core.op_spec import GemmAttributes, GemmScheme, OpSpec, QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FLOAT_BITS",
    "KEPT",
    "LARGEST_FLOAT16",
    "Bits",
    "QuantLinear",
    "QuantScheme",
    "check_abits",
    "check_kv_bits",
    "scheme_for",
]

LARGEST_FLOAT16 = 65504.0  # activations of real models may be larger
KEPT = "kept"  # in a method's place: the checkpoint's own codes, which none made
FLOAT_BITS = 16  # activation or cache bits that mean: left in floating point


def check_abits(abits: int, where: str = "--abits") -> int:
    """Activation bits, if there is such a width.

    Raises:
        InputError: not 2..8 or 16.
    """
    if abits not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise InputError(
            where, f"got {abits}, expected 2 to 8, or 16 for weight-only", "Give one of these"
        )
    return abits


def check_kv_bits(kv_bits: int, where: str = "--kv-bits") -> int:
    """Bits of cached keys and values, if there is such a width.

    Raises:
        InputError: not 2..8 or 16.
    """
    if kv_bits not in (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS):
        raise InputError(
            where,
            f"got {kv_bits}, expected 2 to 8, or 16 for a KV cache in floating point",
            "Give one of these",
        )
    return kv_bits


@dataclass(frozen=True)
class Bits:
    """The widths a user chooses for a linear; see QuantScheme for the fields."""

    codes: CodeSet
    abits: int
    group_size: int


@dataclass(frozen=True)
class QuantScheme:
    """The settings that define the numbers of a quantised model.

    Attributes:
        op: name of the custom op, which decides layout and arithmetic.
        method: who made the codes ("rtn", ...), its true name; or KEPT.
        wbits, abits: nominal bits; abits 16 is weight-only.
        balanced: the 5-level W2* or 3-level W1* code set.
        group_size: 0 is per output channel.
        act_symmetric: symmetric per-token activation codes.
        dtype: "float16", "bfloat16" or "float32": everything that is not integer.
        kv_bits: of keys (after RoPE) and values, asymmetric per token and head; 16 leaves them. One
            number for the whole model.
        has_minimum: weights are scale * code + minimum, as some checkpoints that are already
            quantized say them; see GemmScheme.
    """

    op: str
    method: str
    wbits: int
    abits: int
    balanced: bool = False
    group_size: int = 0
    act_symmetric: bool = False
    dtype: Dtype = "float16"
    kv_bits: int = FLOAT_BITS
    has_minimum: bool = False

    @property
    def kept(self) -> bool:
        """Whether the codes are those that the checkpoint has."""
        return self.method == KEPT

    @property
    def levels(self) -> int:
        """Number of weight codes."""
        return self.codes.levels

    @property
    def codes(self) -> CodeSet:
        """The set of weight codes."""
        return code_set(self.wbits, self.balanced)

    @property
    def gemm(self) -> GemmScheme:
        """What of it concerns the op."""
        return GemmScheme(
            self.wbits,
            self.levels,
            self.abits,
            int(self.act_symmetric),
            self.group_size,
            has_minimum=int(self.has_minimum),
        )

    @property
    def label(self) -> str:
        """Short name of a linear's bits, as a bits file has them: w4a8, w4a8-g64, w2ba8."""
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"w{self.codes.label}a{self.abits}{group}"

    @property
    def model_label(self) -> str:
        """Short name of a model with this base, for folders and reports: its label and, of a
        low-bit cache, -kv4.
        """
        return f"{self.label}-kv{self.kv_bits}" if self.kv_bits < FLOAT_BITS else self.label

    def attributes(self, out_features: int, in_features: int, has_bias: bool) -> GemmAttributes:
        """The node attributes of a layer of this shape."""
        return GemmAttributes(
            **asdict(self.gemm),
            in_features=in_features,
            out_features=out_features,
            has_bias=int(has_bias),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form; has_minimum only where it is true, so that folders without look as they
        did before there was any.
        """
        fields = asdict(self)
        if not self.has_minimum:
            del fields["has_minimum"]
        return fields


def scheme_for(
    bits: Bits,
    ops: Iterable[OpSpec],
    symmetric: bool | None,
    where: str,
    *,
    method: str,
    dtype: Dtype,
    kv_bits: int = FLOAT_BITS,
) -> QuantScheme:
    """The scheme of these bits: what the command line and the rules of a bits file share.

    Args:
        bits: widths, each in its range.
        ops: the first that takes the bits is chosen.
        symmetric: activation codes; None for the op's own.
        where: option or line of a file, for messages.
        method, dtype, kv_bits: of the scheme.

    Raises:
        InputError: none of the ops takes them; says why the first does not.
    """
    refused = None
    for op in ops:
        scheme = QuantScheme(
            op.name,
            method,
            bits.codes.bits,
            bits.abits,
            bits.codes.balanced,
            bits.group_size,
            (op.act_symmetric if symmetric is None else symmetric) and bits.abits < FLOAT_BITS,
            dtype,
            kv_bits,
        )
        objection = op.objection(scheme.gemm)
        if objection is None:
            return scheme
        refused = refused or objection
    assert refused is not None  # there are ops
    raise InputError(where, *refused)


@dataclass(frozen=True)
class QuantLinear:
    """One quantised linear layer, y = x W^T + b: integer codes, never packed."""

    name: str
    scheme: QuantScheme
    arrays: QuantArrays

    @property
    def attributes(self) -> GemmAttributes:
        """The node attributes of this layer."""
        out_features, in_features = self.arrays.codes.shape
        return self.scheme.attributes(out_features, in_features, self.arrays.bias is not None)

    def dequantize(self) -> np.ndarray:
        """The weights the codes stand for, fp32 [N, K], as the op defines them."""
        return op_spec(self.scheme.op).dequantize(self.arrays, self.attributes)

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """Integer weights as fp32 [N, K] and their scales fp32 [N, G]: dequantize() is one times
        the other, group by group, plus arrays.minimum if there is one.
        """
        return op_spec(self.scheme.op).integers(self.arrays, self.attributes)
