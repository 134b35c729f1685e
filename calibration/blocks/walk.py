"""Walks all calibration windows through one block, site by site: each site is quantised on inputs that come from quantised ones before."""

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
    Rope,
    attend,
    float_linear,
    heads_from_qkv,
    mlp_product,
    rms_norm,
)
from calibration.blocks.streams import ActivationWindows, StreamBudget, Windows
from calibration.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.scheme import QuantLinear, QuantScheme
from calibration.solvers.hessian import Moments
from plugins.core.op_spec import QuantArrays

__all__ = ["Streams", "WalkBlock", "site_weight", "walk"]

Solve = Callable[[str, "Moments | None"], QuantArrays]


@dataclass
class Streams:
    """The residual stream before a block, of this process's windows: quantised model, and float model where the method wants it.

    Attributes:
        quant, real: [n][L, hidden] fp32; real is None for methods that do not look at the float model's activations.
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
        schemes: how each site is quantised.
        gains: the quantised block's norm gains, by name.
        scales: of sites whose inputs are the float block's divided channel by channel by s [K]; the norm gains and the
            weights of the site before have taken 1 / s in.
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
        bias = torch.cat([weights[f"{name}.weight"].new_zeros(len(weights[f"{name}.weight"])) if value is None else value
                          for name, value in parts])
    return torch.cat([weights[f"{name}.weight"] for name in SITES[site]]), bias


class _Walk:
    """State between sites: what the next site reads, in both streams."""

    def __init__(self, block: WalkBlock, streams: Streams, measure: bool) -> None:
        self.block, self.streams, self.measure = block, streams, measure
        self.float_linear = float_linear(block.weights)
        self.seen: ActivationWindows | None = None
        self.wanted: Windows | None = None

    def inputs(self, site: str, quant: Callable[[int], Tensor], real: Callable[[int], Tensor] | None) -> Moments | None:
        """Make and keep the inputs of a site from functions of the window's number; their moments if they are wanted."""
        scheme, count, device = self.block.schemes[site], len(self.streams.quant), str(self.block.rope.cos.device)
        seen: ActivationWindows | None = None
        wanted: Windows | None = None
        moments: Moments | None = None
        for index in range(count):
            x = quant(index)
            activation = Activation.of(x, scheme.abits, scheme.act_symmetric)
            if seen is None:
                seen = ActivationWindows(self.streams.budget, count, (x.shape[0], x.shape[1]), scheme.abits, device)
                if real is not None:
                    wanted = self.streams.budget.windows(count, tuple(x.shape), device=device)
                moments = Moments(x.shape[1], real is not None, device) if self.measure else None
            seen[index] = activation
            target = None
            if real is not None and wanted is not None:
                wanted[index] = target = real(index)
                target = target / self.block.scales[site] if site in self.block.scales else target
            if moments is not None:
                moments.add(activation.values(), target)
        self._release()
        self.seen, self.wanted = seen, wanted
        return moments

    def _release(self) -> None:
        for windows in (self.seen, self.wanted):
            if windows is not None:
                windows.close()

    def linear(self, site: str, arrays: QuantArrays) -> FakeQuantLinear:
        scheme = self.block.schemes[site]
        quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric) if scheme.abits < 16 else None
        linear = FakeQuantLinear(QuantLinear(site, scheme, arrays), quantizer)
        linear.to(self.block.rope.cos.device)
        return linear

    def product(self, site: str, linear: FakeQuantLinear) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor] | None]:
        """The site's output in both streams, by window; the inputs kept now stay alive as long as these functions."""
        seen, wanted = self.seen, self.wanted
        assert seen is not None
        return (lambda index: linear.multiply(seen[index]),
                None if wanted is None else lambda index: self.float_linear(site, wanted[index]))

    def attention(self, qkv: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        return lambda index: attend(*heads_from_qkv(qkv(index)[None], self.block.shape, self.block.rope))[0]

    def normed(self, norm: str, windows: Windows, gains: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
        gain = gains[f"{norm}.weight"]
        return lambda index: rms_norm(windows[index], gain, self.block.shape.epsilon)

    def add(self, quant: Callable[[int], Tensor], real: Callable[[int], Tensor] | None) -> None:
        """Onto the residual streams."""
        for index in range(len(self.streams.quant)):
            self.streams.quant[index] = self.streams.quant[index] + quant(index)
            if real is not None and self.streams.real is not None:
                self.streams.real[index] = self.streams.real[index] + real(index)


@torch.no_grad()  # type: ignore[untyped-decorator]
def walk(block: WalkBlock, streams: Streams, solve: Solve, measure: bool = True) -> dict[str, QuantArrays]:
    """Quantise the sites in execution order and move both streams past the block, in place.

    Args:
        block: what to walk.
        streams: the residual streams before the block; afterwards those behind it.
        solve: codes of a site from the moments of its inputs (None without `measure`). Looking up finished codes gives the very
            bits of the first run, which is how a killed calibration goes on.
        measure: sum up moments.

    Returns:
        What `solve` gave, by site, members stacked along N.
    """
    state, found = _Walk(block, streams, measure), {}

    def site(name: str, quant: Callable[[int], Tensor], real: Callable[[int], Tensor] | None,
             ) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor] | None]:
        found[name] = solve(name, state.inputs(name, quant, real))
        return state.product(name, state.linear(name, found[name]))

    def normed(norm: str) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor] | None]:
        return (state.normed(norm, streams.quant, block.gains),
                None if streams.real is None else state.normed(norm, streams.real, block.weights))

    quant, real = site(QKV, *normed(INPUT_NORM))
    state.add(*site(OUT, state.attention(quant), real and state.attention(real)))
    quant, real = site(GATE_UP, *normed(POST_NORM))
    state.add(*site(DOWN, _then(mlp_product, quant), real and _then(mlp_product, real)))
    state._release()
    return found


def _then(function: Callable[[Tensor], Tensor], inner: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    return lambda index: function(inner(index))
