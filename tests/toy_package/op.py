"""A whole op in one file, to be copied: W3A8 with codes -3..3 and scales that are a power of two
times the channel's, so that a group costs one byte.

tests/test_toy_op.py installs it as a package of its own and takes it from a float model to
a proven ONNX file. It has no kernel: ONNX Runtime runs its body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from plugins.core.activation import quantize_activation, rms_norm, saturate_cast
from plugins.core.op_spec import ArraySpec, GemmAttributes, GemmScheme, Grid, OpSpec, QuantArrays
from plugins.core.packing import check_attributes, check_shapes
from plugins.core.rounding import SMALLEST_SCALE, grouped
from plugins.errors import InputError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

__all__ = ["SPEC", "ToyGemm", "ToyGrid"]

LARGEST = 3  # codes -3..3
HIGHEST_POWER = 5  # 3 * 2^5 is an int8 weight


class ToyGemm(OpSpec):
    """Y = X W^T + b with W = scale[n] * 2^power[n, g] * code, X int8 per token."""

    name = "ToyGemm"
    method = "qqq"  # GPTQ, on any grid
    rank = 0  # asked before an op for all bits
    act_symmetric = True

    def objection(self, scheme: GemmScheme) -> tuple[str, str] | None:
        """W3A8 in groups, with symmetric activations."""
        if (scheme.wbits, scheme.levels, scheme.abits, scheme.act_symmetric) != (3, 8, 8, 1):
            return f"got {scheme.title}, expected W3A8 with symmetric activations", "Use W3A8"
        if not scheme.group_size:
            return "got no groups, expected a group size", "Use --group-size 16"
        return None

    def check(self, attrs: GemmAttributes, where: str) -> None:
        """Raise InputError if this op cannot run these attributes."""
        check_attributes(self, attrs, where)

    def input_names(self, attrs: GemmAttributes) -> list[str]:
        """X, weight, scale, power and, if there are, bias and the norm's gamma."""
        return ["X", "weight", "scale", "power", *attrs.optional_inputs]

    def arrays(self, attrs: GemmAttributes) -> tuple[ArraySpec, ...]:
        """Codes, channel scales, the power of two of each group, bias."""
        rows = attrs.out_features
        return (
            ArraySpec("codes", "int8", (rows, attrs.in_features), attrs.wbits),
            ArraySpec("scale", "float32", (rows, 1)),
            ArraySpec("power", "int8", (rows, attrs.n_groups)),
            *([ArraySpec("bias", "float32", (rows,))] if attrs.has_bias else []),
        )

    def pack(self, arrays: QuantArrays, attrs: GemmAttributes, where: str) -> dict[str, np.ndarray]:
        """As they are: a byte per weight."""
        self.check(attrs, where)
        check_shapes(arrays, attrs, where, scale_columns=1)
        if int(np.abs(arrays.codes).max()) > LARGEST:
            raise InputError(where, f"got codes beyond +-{LARGEST}", "Quantise the layer again")
        named = arrays.named()
        return {"weight": named.pop("codes")} | named

    def unpack(self, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes) -> QuantArrays:
        """Inverse of pack()."""
        own = {"weight", "scale", "power", "bias"} & tensors.keys()
        return QuantArrays.of(
            {"codes" if name == "weight" else name: tensors[name] for name in own}
        )

    def integers(self, arrays: QuantArrays, attrs: GemmAttributes) -> tuple[np.ndarray, np.ndarray]:
        """code * 2^power, a whole number within int8, and the channel scale."""
        power = np.exp2(arrays.more["power"].astype(np.float32))[..., None]
        weight = grouped(arrays.codes.astype(np.float32), attrs.group_size) * power
        return weight.reshape(arrays.codes.shape), arrays.scale

    def reference(
        self, x: np.ndarray, tensors: Mapping[str, np.ndarray], attrs: GemmAttributes
    ) -> np.ndarray:
        """Exact sums, then fp32."""
        weight, scale = self.integers(self.unpack(tensors, attrs), attrs)
        x_normed = rms_norm(x, tensors["gamma"], attrs.norm_epsilon) if attrs.has_norm else x
        codes, x_scale, _ = quantize_activation(x_normed.reshape(-1, attrs.in_features), 8, True)
        sums = (codes.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
        y = sums * scale.T * x_scale
        if attrs.has_bias:
            y = y + tensors["bias"]
        return saturate_cast(y, x.dtype).reshape(*x.shape[:-1], attrs.out_features)

    def function_body(self, attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
        """The same in standard ops: sums in fp64, where they are exact."""
        from onnx import TensorProto

        from plugins.core.onnx_body import CODE_OFFSET, BodyBuilder

        body = BodyBuilder(attrs, dtype)
        codes, x_scale, _ = body.quantize()
        x = body.node(
            "Sub", body.cast(codes, TensorProto.DOUBLE), body.const(CODE_OFFSET, np.float64)
        )
        power = body.node("Pow", body.const(2, np.float64), body.cast("power", TensorProto.DOUBLE))
        weight = body.reshape(
            body.cast("weight", TensorProto.DOUBLE),
            body.feature("out_features"),
            -1,
            body.feature("group_size"),
        )
        weight = body.node("Mul", weight, body.node("Unsqueeze", power, body.ints(2)))
        weight = body.reshape(weight, body.feature("out_features"), body.feature("in_features"))
        sums = body.node("MatMul", x, body.node("Transpose", weight, perm=[1, 0]))
        y = body.node(
            "Mul",
            body.cast(sums, TensorProto.FLOAT),
            body.node("Transpose", "scale", perm=[1, 0]),
        )
        body.finish(body.node("Mul", y, x_scale))
        return body.function(self.name, self.input_names(attrs), domain)

    def unpacked_bytes(self, scheme: GemmScheme) -> int:
        """The weight as fp64 three times."""
        return 24

    def search_grid(
        self, groups: Tensor, importance: Tensor, ratios: Sequence[float], scheme: GemmScheme
    ) -> Grid:
        """The channel's scale from its largest weight, then the best power of each group."""
        import torch

        from plugins.core.grid import better

        absmax = groups.abs().amax(-1)
        farthest = absmax.amax(1, keepdim=True) / (LARGEST << HIGHEST_POWER)
        channel, best = farthest.clamp(min=SMALLEST_SCALE), None
        for power in range(0 if len(ratios) > 1 else HIGHEST_POWER, HIGHEST_POWER + 1):
            step = channel[..., None] * 2.0**power
            error = (groups / step).round().clamp(-LARGEST, LARGEST).mul(step).sub(groups)
            powers = torch.full_like(absmax, power)
            best = better(best, error.square().mul(importance).sum(-1), powers, powers)
        assert best is not None
        return ToyGrid(channel, best[1])

    def grid_from_arrays(
        self, arrays: QuantArrays, scheme: GemmScheme, device: str = "cpu"
    ) -> Grid:
        """The grid of these scales."""
        import torch

        scale, power = torch.from_numpy(arrays.scale), torch.from_numpy(arrays.more["power"])
        return ToyGrid(scale.to(device), power.float().to(device))

    def rounding_bound(self, weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
        """Half a step of the channel's absmax / 3, and never further than to 0."""
        size = np.abs(weight)
        bound = np.minimum(size.max(1, keepdims=True) / (2 * LARGEST), size)
        return np.asarray(bound + SMALLEST_SCALE * 2**HIGHEST_POWER, np.float32)


@dataclass(frozen=True)
class ToyGrid:
    """channel [N, 1] and power [N, G], fp32; see Grid."""

    channel: Tensor
    power: Tensor

    def round(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights."""
        channel = self.channel[:, 0] if weight.ndim == 1 else self.channel
        scale = channel * self.power[:, group].exp2()
        codes = (weight / scale).round().clamp(-LARGEST, LARGEST)
        return codes, codes * self.power[:, group].exp2() * channel

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """Weights that codes stand for."""
        return codes * self.power[:, group].exp2() * self.channel

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> ToyGrid:
        """Other channel scales; powers stay."""
        from plugins.core.grid import fitted_scales

        groups = codes.unflatten(1, (self.power.shape[1], -1)) * self.power.exp2()[..., None]
        integers = groups.flatten(1)[:, None]
        return replace(self, channel=fitted_scales(integers, weight, hessian, self.channel))

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""
        import torch

        return QuantArrays(
            codes.to(torch.int8).cpu().numpy(),
            self.channel.float().cpu().numpy(),
            bias=None if bias is None else bias.float().cpu().numpy(),
            more={"power": self.power.to(torch.int8).cpu().numpy()},
        )


SPEC = ToyGemm()
