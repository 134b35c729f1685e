"""How a model is quantised, and one linear layer's integer codes with the numbers they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from plugins.core.errors import InputError
from plugins.core.op_spec import GemmAttributes, QuantArrays

if TYPE_CHECKING:
    import numpy as np

__all__ = ["QuantLinear", "QuantScheme", "parse_wbits"]

BALANCED_LEVELS = {1: 3, 2: 5}  # W1* and W2*, "bit balance" of ABQ-LLM (arXiv 2408.08554)


def parse_wbits(text: str) -> tuple[int, bool]:
    """Weight bits from the command line: ("4") -> (4, False); ("2*") or ("2b") -> (2, True), the balanced set.

    Raises:
        InputError: not an integer 1..8, 1* or 2*.
    """
    balanced = text.endswith(("*", "b"))
    digits = text[:-1] if balanced else text
    if not digits.isdigit() or not 1 <= int(digits) <= 8 or (balanced and int(digits) not in BALANCED_LEVELS):
        raise InputError("--wbits", f"got {text!r}, expected 1 to 8, 1* (3 levels) or 2* (5 levels)",
                         "Give one of these; in a shell write 2b or '2*' for the balanced set")
    return int(digits), balanced


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
    """

    op: str
    method: str
    wbits: int
    abits: int
    balanced: bool = False
    group_size: int = 0
    act_symmetric: bool = False
    dtype: str = "float16"

    @property
    def levels(self) -> int:
        """Number of weight codes."""
        return BALANCED_LEVELS[self.wbits] if self.balanced else 1 << self.wbits

    @property
    def label(self) -> str:
        """Short name, for folders and reports: w4a8, w4a8-g64, w2ba8."""
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"w{self.wbits}{'b' if self.balanced else ''}a{self.abits}{group}"

    def attributes(self, out_features: int, in_features: int, has_bias: bool) -> GemmAttributes:
        """The node attributes of a layer of this shape."""
        return GemmAttributes(self.wbits, self.levels, self.abits, int(self.act_symmetric), self.group_size,
                              in_features, out_features, int(has_bias))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


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
        """Integer weights as fp32 [N, K] and their scales fp32 [N, G]: dequantize() is one times the other, group by group."""
        from plugins import op_spec

        return op_spec(self.scheme.op).integers(self.arrays, self.attributes)
