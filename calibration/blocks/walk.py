"""Walks all calibration windows through one block, site by site: each site is quantised on inputs
that come from quantised ones before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.blocks.forward import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    OUT,
    POST_NORM,
    QKV,
    SITES,
    BlockShape,
    BlockWeights,
    Heads,
    Rope,
    attend,
    cached_heads,
    float_linear,
    heads_from_qkv,
    mlp_product,
    rms_norm,
)
from calibration.blocks.streams import ActivationWindows, StreamBudget, Windows
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.solvers.hessian import Moments
from plugins.core.op_spec import QuantArrays

__all__ = ["Streams", "WalkBlock", "site_weight", "walk"]

Solve = Callable[[str, "Moments | None"], QuantArrays]


@dataclass
class Streams:
    """The residual stream before a block, of this process's windows: quantised model, and float
    model where the method wants it.

    Attributes:
        quant, real: [n][L, hidden] fp32; real is None for methods that do not look at the float
            model's activations.
        budget: where scratch activations come from.
    """

    quant: Windows
    real: Windows | None
    budget: StreamBudget


@dataclass(frozen=True)
class WalkBlock:
    """A block to walk.

    Attributes:
        weights: the float block, on which the float stream runs.
        shape, rope: its sizes and its position tables.
        schemes: how each site is quantised, and the cache.
        gains: the quantised block's norm gains, by name.
        scales: of sites whose inputs are the float block's divided channel by channel by s [K]; the
            norm gains and the weights of the site before have taken 1 / s in.
    """

    weights: BlockWeights
    shape: BlockShape
    rope: Rope
    schemes: Mapping[str, QuantScheme]
    gains: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def site_weight(weights: BlockWeights, site: str) -> tuple[Tensor, Tensor | None]:
    """Stacked weight [N, K] and bias [N] or None of a site."""
    biases = [weights.get(f"{name}.bias") for name in SITES[site]]
    bias = None
    if any(value is not None for value in biases):
        parts = zip(SITES[site], biases, strict=True)
        bias = torch.cat(
            [
                weights[f"{name}.weight"].new_zeros(len(weights[f"{name}.weight"]))
                if value is None
                else value
                for name, value in parts
            ]
        )
    return torch.cat([weights[f"{name}.weight"] for name in SITES[site]]), bias


@dataclass
class _Half:
    """Half of a block: a norm, a site that reads it, a function in the middle, and a site that
    writes to the residual stream.

    The function may differ between the streams: keys and values go through a low-bit cache in the
    quantised one only.

    The first site's inputs are made anew from the residual stream when they are needed, and the
    float stream moves on while the second site's inputs are made, so nothing but that site's int8
    codes is kept.
    """

    block: WalkBlock
    streams: Streams
    sites: tuple[str, str]
    norm: str
    middle: Callable[[Tensor], Tensor]
    real_middle: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self._real = float_linear(self.block.weights)

    def quant_input(self, index: int) -> Activation:
        """What the first site reads in the quantised model."""
        scheme = self.block.schemes[self.sites[0]]
        return Activation.of(
            self._normed(self.streams.quant, index, self.block.gains),
            scheme.abits,
            scheme.act_symmetric,
        )

    def real_input(self, index: int) -> Tensor | None:
        """What it reads in the float model."""
        return (
            None
            if self.streams.real is None
            else self._normed(self.streams.real, index, self.block.weights)
        )

    def _normed(self, windows: Windows, index: int, gains: Mapping[str, Tensor]) -> Tensor:
        return rms_norm(windows[index], gains[f"{self.norm}.weight"], self.block.shape.epsilon)

    def add(self, moments: Moments, site: str, seen: Activation, wanted: Tensor | None) -> None:
        """A window into the moments of a site."""
        if wanted is not None and site in self.block.scales:
            wanted = wanted / self.block.scales[site]
        moments.add(seen.values(), wanted)

    def moments(self, site: str, measure: bool) -> Moments | None:
        """An empty sum, if sums are wanted."""
        device = str(self.block.rope.cos.device)
        return Moments(self.width(site), self.streams.real is not None, device) if measure else None

    def width(self, site: str) -> int:
        """K of a site."""
        return int(self.block.weights[f"{SITES[site][0]}.weight"].shape[1])

    def run(self, solve: Solve, measure: bool) -> dict[str, QuantArrays]:
        """Both sites, and both streams past them."""
        first, second = self.sites
        moments = self.moments(first, measure)
        if moments is not None:
            for index in range(len(self.streams.quant)):
                self.add(moments, first, self.quant_input(index), self.real_input(index))
        found = {first: solve(first, moments)}
        seen, moments = self._second_inputs(self._linear(first, found[first]), measure)
        found[second] = solve(second, moments)
        linear = self._linear(second, found[second])
        for index, activation in enumerate(seen):
            self.streams.quant[index] = self.streams.quant[index] + linear.multiply(activation)
        seen.close()
        return found

    def _second_inputs(
        self, linear: FakeQuantLinear, measure: bool
    ) -> tuple[ActivationWindows, Moments | None]:
        """Of the quantised model, to be kept, and their moments; the float stream moves on to the
        end of the half.
        """
        first, second = self.sites
        scheme, quant, real = self.block.schemes[second], self.streams.quant, self.streams.real
        moments, size = self.moments(second, measure), (quant.shape[1], self.width(second))
        seen = ActivationWindows(
            self.streams.budget, len(quant), size, scheme, str(self.block.rope.cos.device)
        )
        for index in range(len(quant)):
            seen[index] = activation = Activation.of(
                self.middle(linear.multiply(self.quant_input(index))),
                scheme.abits,
                scheme.act_symmetric,
            )
            wanted = None
            if real is not None:
                wanted = self.real_middle(
                    self._real(first, self._normed(real, index, self.block.weights))
                )
                real[index] = real[index] + self._real(second, wanted)
            if moments is not None:
                self.add(moments, second, activation, wanted)
        return seen, moments

    def _linear(self, site: str, arrays: QuantArrays) -> FakeQuantLinear:
        scheme = self.block.schemes[site]
        quantizer = (
            ActivationQuantizer(scheme.abits, scheme.act_symmetric) if scheme.abits < 16 else None
        )
        linear = FakeQuantLinear(QuantLinear(site, scheme, arrays), quantizer, exact=False)
        linear.to(self.block.rope.cos.device)
        return linear


@torch.no_grad()  # type: ignore[untyped-decorator]
def walk(
    block: WalkBlock, streams: Streams, solve: Solve, measure: bool = True
) -> dict[str, QuantArrays]:
    """Quantise the sites in execution order and move both streams past the block, in place.

    Args:
        block: what to walk.
        streams: the residual streams before the block; afterwards those behind it.
        solve: codes of a site from the moments of its inputs (None without `measure`). Looking up
            finished codes gives the very bits of the first run, which is how a killed calibration
            goes on.
        measure: sum up moments.

    Returns:
        What `solve` gave, by site, members stacked along N.
    """

    def attention(heads: Heads) -> Callable[[Tensor], Tensor]:
        return lambda qkv: attend(*heads(qkv[None], block.shape, block.rope))[0]

    quantised = cached_heads(block.schemes[QKV].kv_bits)
    found = _Half(
        block, streams, (QKV, OUT), INPUT_NORM, attention(quantised), attention(heads_from_qkv)
    ).run(solve, measure)
    return found | _Half(block, streams, (GATE_UP, DOWN), POST_NORM, mlp_product, mlp_product).run(
        solve, measure
    )
