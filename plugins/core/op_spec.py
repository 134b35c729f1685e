"""What a custom op is. Everything that others want to know of an op, they ask its OpSpec; nobody
compares its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

from plugins.core.code_sets import levels_with

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor

__all__ = [
    "DOMAIN",
    "AffineForm",
    "ArraySpec",
    "GemmAttributes",
    "GemmScheme",
    "Grid",
    "OpSpec",
    "PLUGIN_VERSION",
    "QuantArrays",
    "is_custom",
]

# TensorRT plugin namespace and ONNX domain; further schemes have domains below it, "anybit.v1"
DOMAIN = "anybit"
PLUGIN_VERSION = "1"


def is_custom(domain: str) -> bool:
    """Whether a node of this ONNX domain is one of ours."""
    return domain == DOMAIN or domain.startswith(f"{DOMAIN}.")


@dataclass(frozen=True)
class GemmScheme:
    """What a low-bit GEMM computes with, whatever its sizes.

    Attributes:
        wbits: nominal weight bits, 1..8.
        levels: number of weight codes, of a set in plugins/core/code_sets.py.
        abits: activation bits, 2..8, or 16 for weight-only.
        act_symmetric: 1 for symmetric per-token activation codes, 0 for asymmetric ones.
        group_size: input channels that share a weight scale; 0 means the whole row (per channel).
        has_minimum: 1 if a group has an fp32 minimum, the weight of code 0, in the place of a zero
            point: w = scale * code + minimum.
    """

    wbits: int
    levels: int
    abits: int
    act_symmetric: int
    group_size: int
    has_minimum: int = field(default=0, kw_only=True)

    @property
    def planes(self) -> int:
        """Bit planes that hold the codes 0..levels-1."""
        return (self.levels - 1).bit_length()

    @property
    def title(self) -> str:
        """The widths, for messages: W4A8, W2*A8."""
        codes = levels_with(self.wbits).get(self.levels)
        weights = codes.title if codes else f"{self.wbits} ({self.levels} levels) "
        return f"W{weights}A{self.abits}"


@dataclass(frozen=True)
class GemmAttributes(GemmScheme):
    """Attributes of a low-bit GEMM node; the plugin reads the same names as its fields.

    Attributes:
        in_features: K, length of a weight row.
        out_features: N, number of weight rows.
        has_bias: 1 if there is a bias.
        norm_epsilon: of the RMSNorm of X, whose gamma is then the last input; 0 means no norm.
    """

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
    def has_norm(self) -> bool:
        """Whether X goes through an RMSNorm first."""
        return self.norm_epsilon > 0

    @property
    def optional_inputs(self) -> list[str]:
        """The inputs that come last in every op: bias, fp32 [N], and gamma, [K] of X's type."""
        return [*(["bias"] if self.has_bias else []), *(["gamma"] if self.has_norm else [])]

    def as_dict(self) -> dict[str, int | float]:
        """The attributes by name, as written into the ONNX node; has_minimum only where it is 1, so
        that files without look as they did before there was any.
        """
        fields = asdict(self)
        if not self.has_minimum:
            del fields["has_minimum"]
        return fields


@dataclass(frozen=True)
class ArraySpec:
    """One of the arrays that hold a layer's unpacked weights.

    Attributes:
        name: its name in QuantArrays and, behind the layer's, in the quant folder.
        dtype: its numpy type, "int8".
        shape: its first axis is the output channels, so that layers can be stacked and cut.
        bits: of an element where it is stored without waste; 0 stands for those of the type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int = 0

    @property
    def stored_bits(self) -> int:
        """Bits of the whole array, stored without waste."""
        import math

        import numpy as np

        return math.prod(self.shape) * (self.bits or 8 * np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class QuantArrays:
    """Unpacked weights of one linear layer (or of several fused along N), as numpy arrays.

    Which ones an op has, with their types and shapes, OpSpec.arrays says; the first axis of each is
    N.

    Attributes:
        codes: [N, K] integer codes, of every op.
        scale: fp32 [N, G].
        zero: integer [N, G], in code units, or None.
        scale_group: second-level scale [N, G], or None.
        bias: fp32 [N] or None.
        minimum: fp32 [N, G] in the place of zero, or None.
        more: what else an op has, by name.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    scale_group: np.ndarray | None = None
    bias: np.ndarray | None = None
    minimum: np.ndarray | None = None
    more: Mapping[str, np.ndarray] = field(default_factory=dict)

    def named(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        own = {name: array for name, array in vars(self).items() if name != "more"}
        return {name: array for name, array in (own | dict(self.more)).items() if array is not None}

    @classmethod
    def of(cls, named: Mapping[str, np.ndarray]) -> QuantArrays:
        """Inverse of named()."""
        own = {name: array for name, array in named.items() if name in cls.__dataclass_fields__}
        return cls(**own, more={name: array for name, array in named.items() if name not in own})

    def rows(self, part: slice) -> QuantArrays:
        """The same of some output channels, as views."""
        return self.of({name: array[part] for name, array in self.named().items()})

    @classmethod
    def stacked(cls, parts: Sequence[QuantArrays]) -> QuantArrays:
        """Parts that have the same arrays as one, along the output channels."""
        import numpy as np

        named = [part.named() for part in parts]
        return cls.of({name: np.concatenate([part[name] for part in named]) for name in named[0]})


@dataclass(frozen=True)
class AffineForm:
    """How weights read for a format that knows w = scale * (code - zero point) and nothing else.

    QuantArrays.scale are the scales. With zero points, QuantArrays.codes and .zero are the codes
    0..2^bits-1 and theirs; if symmetric, OpSpec.integers gives the codes, signed.

    Attributes:
        bits: of the codes.
        symmetric: without zero points.
        group_size: input channels that share a scale; 0 is per output channel.
    """

    bits: int
    symmetric: bool
    group_size: int


class Grid(Protocol):
    """What an op can say of a weight matrix, with its scales chosen: torch, for calibration.

    Whatever is rounded on it reaches the kernel untouched. A frozen dataclass whose tensors have
    the output channels as their first axis.
    """

    def round(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights.

        Args:
            weight: [N] with the number of their group, or [N, K] with the group of each column [K].
        """

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """Weights [N, K] that codes [N, K] stand for, the very numbers of OpSpec.dequantize."""

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> Grid:
        """The grid with the scales that suit these codes best, least squares under H [K, K]; see
        plugins.core.grid.fitted_scales.
        """

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""


class OpSpec(ABC):
    """One custom op. Each op folder's op.py defines an object SPEC of such a class.

    Attributes:
        name: ONNX op_type and TensorRT plugin name.
        method: the calibration method made for this op, which takes no other; "" if there is none,
            and then weights are rounded to nearest where nobody names a method.
        rank: of several ops that take a scheme, the one of the lowest rank is chosen.
        act_symmetric: whether activation codes are symmetric where nobody says.
        published: the format of published checkpoints whose packed weights are the op's own, one of
            calibration.formats; "" if there is none.
    """

    name: str
    method: str = ""
    rank: int = 1
    act_symmetric: bool = False
    published: str = ""

    # ---------------------------------------------------------------- what it takes

    @abstractmethod
    def objection(self, scheme: GemmScheme) -> tuple[str, str] | None:
        """Why the op does not take a scheme, whatever the sizes of the layers: the problem and what
        to do, as in an InputError. None if it does.
        """

    def takes(self, scheme: GemmScheme) -> bool:
        """Whether there is no objection."""
        return self.objection(scheme) is None

    @abstractmethod
    def check(self, attrs: GemmAttributes, where: str) -> None:
        """Raise InputError if this op cannot run these attributes; see
        plugins.core.packing.check_attributes.
        """

    @abstractmethod
    def input_names(self, attrs: GemmAttributes) -> list[str]:
        """Formal inputs in order; the first is "X", the others but gamma are keys of pack()'s
        result.
        """

    # ---------------------------------------------------------------- its weights

    @abstractmethod
    def arrays(self, attrs: GemmAttributes) -> tuple[ArraySpec, ...]:
        """The unpacked arrays of a layer in the order of the quant folder: codes [N, K] first, bias
        last.
        """

    @abstractmethod
    def pack(self, arrays: QuantArrays, attrs: GemmAttributes, where: str) -> dict[str, np.ndarray]:
        """Initializers by input name, in the layout the kernels read. Raises InputError on bad
        codes.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes) -> QuantArrays:
        """Inverse of pack()."""

    @abstractmethod
    def integers(self, arrays: QuantArrays, attrs: GemmAttributes) -> tuple[np.ndarray, np.ndarray]:
        """What the kernel multiplies activation codes with: whole numbers as fp32 [N, K], a new
        array, and the scale fp32 [N, G] of each of G groups. Where there is a minimum, it is not in
        them.
        """

    def dequantize(self, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
        """The real numbers that the codes stand for, fp32 [N, K]: integers() times their scale, plus
        the minimum if there is one, each rounded on its own.
        """
        weight, scale = self.integers(arrays, attrs)
        groups = weight.reshape(*scale.shape, -1)
        groups *= scale[..., None]
        if arrays.minimum is not None:
            groups += arrays.minimum[..., None]
        return weight

    def affine(self, scheme: GemmScheme) -> AffineForm | None:
        """How other formats read the weights; None if they cannot."""
        return None

    def from_affine(self, arrays: QuantArrays, scheme: GemmScheme, where: str) -> QuantArrays:
        """The arrays of this op from the codes 0..2^bits-1, scales and zero points that its
        AffineForm speaks of: here they are these. Raises InputError on zero points that it cannot
        say.
        """
        return arrays

    # ---------------------------------------------------------------- what it computes

    @abstractmethod
    def reference(
        self, x: np.ndarray, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes
    ) -> np.ndarray:
        """Y [..., N] in x's dtype (fp16, bf16 of ml_dtypes, or fp32) from x [..., K], packed
        tensors and gamma.
        """

    @abstractmethod
    def function_body(self, attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
        """Local function of standard ops computing the same integers; dtype is onnx.TensorProto.*.

        The body takes in_features and out_features from the node's attributes, so one function
        serves every layer of a model that has the same scheme.
        """

    @abstractmethod
    def unpacked_bytes(self, scheme: GemmScheme) -> int:
        """Bytes per weight that ONNX Runtime holds while it loads the body: it unpacks every weight
        in steps and keeps all of them until it has finished.
        """

    # ---------------------------------------------------------------- how weights are rounded

    @abstractmethod
    def search_grid(
        self, groups: Tensor, importance: Tensor, ratios: Sequence[float], scheme: GemmScheme
    ) -> Grid:
        """The grid of least error sum_k importance[k] (w - w^)^2 per group, over clipped ranges.

        Args:
            groups: weights, fp32 [n, G, group_len]: some output channels of a layer.
            importance: of each input channel, [G, group_len].
            ratios: parts of the min/max range to try; the first is 1.
        """

    @abstractmethod
    def grid_from_arrays(
        self, arrays: QuantArrays, scheme: GemmScheme, device: str = "cpu"
    ) -> Grid:
        """The grid that these arrays lie on."""

    def round_plain(self, weight: np.ndarray, scheme: GemmScheme) -> QuantArrays:
        """Round to nearest, without a search: here on the min/max grid.

        Args:
            weight: fp32 [n, K], finite.
        """
        import torch

        rows = torch.from_numpy(weight)
        groups = rows.unflatten(1, (-1, scheme.group_size or rows.shape[1]))
        grid = self.search_grid(groups, torch.ones(groups.shape[1:]), [1.0], scheme)
        number = torch.arange(rows.shape[1]) // groups.shape[2]
        return grid.arrays(grid.round(rows, number)[0], None)

    @abstractmethod
    def rounding_bound(self, weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
        """Largest honest error of every weight after round_plain(), fp32 [n, K].

        It follows from the weights and the number of levels alone, never from scales that were
        stored, so that a wrong scale shows as well as a wrong code.

        Args:
            weight: fp32 [n, K], finite.
        """
