"""How a model is quantised, and one linear layer's integer codes with the numbers they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FLOAT_BITS",
    "QQQ_GROUPS",
    "Bits",
    "QuantLinear",
    "QuantScheme",
    "check_abits",
    "check_kv_bits",
    "parse_wbits",
    "scheme_for",
]

FLOAT_BITS = 16  # activation or cache bits that mean: left in floating point
QQQ_GROUPS = (0, 64, 128)  # group sizes of QQQGemm
BALANCED_LEVELS = {1: 3, 2: 5}  # W1* and W2*, "bit balance" of ABQ-LLM (arXiv 2408.08554)


def parse_wbits(text: str, where: str = "--wbits") -> tuple[int, bool]:
    """Weight bits as a user writes them: ("4") -> (4, False); ("2*") or ("2b") -> (2, True), the
    balanced set.

    Raises:
        InputError: not an integer 1..8, 1* or 2*.
    """
    balanced = text.endswith(("*", "b"))
    digits = text[:-1] if balanced else text
    if (
        not digits.isdigit()
        or not 1 <= int(digits) <= 8
        or (balanced and int(digits) not in BALANCED_LEVELS)
    ):
        raise InputError(
            where,
            f"got {text!r}, expected 1 to 8, 1* (3 levels) or 2* (5 levels)",
            "Give one of these; in a shell write 2b or '2*' for the balanced set",
        )
    return int(digits), balanced


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

    wbits: int
    balanced: bool
    abits: int
    group_size: int

    @property
    def w4a8(self) -> bool:
        """Whether these are QQQGemm's widths."""
        return (self.wbits, self.balanced, self.abits) == (4, False, 8)


@dataclass(frozen=True)
class QuantScheme:
    """The settings that define the numbers of a quantised model.

    Attributes:
        op: "ABQGemm" or "QQQGemm", the layout and arithmetic.
        method: who made the codes ("rtn", ...), its true name.
        wbits, abits: nominal bits; abits 16 is weight-only.
        balanced: the 5-level W2* or 3-level W1* code set.
        group_size: 0 is per output channel.
        act_symmetric: symmetric per-token activation codes.
        dtype: "float16", "bfloat16" or "float32": everything that is not integer.
        kv_bits: of keys (after RoPE) and values, asymmetric per token and head; 16 leaves them. One
            number for the whole model.
    """

    op: str
    method: str
    wbits: int
    abits: int
    balanced: bool = False
    group_size: int = 0
    act_symmetric: bool = False
    dtype: str = "float16"
    kv_bits: int = FLOAT_BITS

    @property
    def levels(self) -> int:
        """Number of weight codes."""
        return BALANCED_LEVELS[self.wbits] if self.balanced else 1 << self.wbits

    @property
    def label(self) -> str:
        """Short name of a linear's bits, as a bits file has them: w4a8, w4a8-g64, w2ba8."""
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"w{self.wbits}{'b' if self.balanced else ''}a{self.abits}{group}"

    @property
    def model_label(self) -> str:
        """Short name of a model with this base, for folders and reports: its label and, of a
        low-bit cache, -kv4.
        """
        return f"{self.label}-kv{self.kv_bits}" if self.kv_bits < FLOAT_BITS else self.label

    def attributes(self, out_features: int, in_features: int, has_bias: bool) -> GemmAttributes:
        """The node attributes of a layer of this shape."""
        return GemmAttributes(
            self.wbits,
            self.levels,
            self.abits,
            int(self.act_symmetric),
            self.group_size,
            in_features,
            out_features,
            int(has_bias),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def scheme_for(bits: Bits, op: str, symmetric: bool | None, method: str, dtype: str) -> QuantScheme:
    """The scheme of these bits: what the command line and the rules of a bits file share.

    Args:
        bits: widths, each in its range.
        op: "QQQGemm" for that op wherever it takes these bits, and ABQGemm elsewhere; "ABQGemm" for
            that alone.
        symmetric: activation codes; None for the op's own: symmetric for QQQGemm, asymmetric for
            ABQGemm.
        method, dtype: of the scheme.
    """
    qqq = op == "QQQGemm" and bits.w4a8 and bits.group_size in QQQ_GROUPS and symmetric is not False
    act_symmetric = (qqq if symmetric is None else symmetric) and bits.abits < 16
    return QuantScheme(
        "QQQGemm" if qqq else "ABQGemm",
        method,
        bits.wbits,
        bits.abits,
        bits.balanced,
        bits.group_size,
        act_symmetric,
        dtype,
    )


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
        from plugins import op_spec

        return op_spec(self.scheme.op).dequantize(self.arrays, self.attributes)

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """Integer weights as fp32 [N, K] and their scales fp32 [N, G]: dequantize() is one times
        the other, group by group.
        """
        from plugins import op_spec

        return op_spec(self.scheme.op).integers(self.arrays, self.attributes)
