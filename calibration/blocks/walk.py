"""Walks all calibration windows through one block, site by site: each site is quantised on inputs
that come from quantised ones before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, float_linear
from calibration.blocks.streams import ActivationWindows, StreamBudget, Windows
from calibration.families.decoder import Block, Branch
from calibration.families.steps import Linears, Step
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.reference.steps import Context, Rope, cached_heads, run
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
        block: its steps.
        weights: the float block, on which the float stream runs.
        rope: its position tables.
        schemes: how each site is quantised, and the cache.
        gains: the quantised block's norm gains, by name.
        scales: of sites whose inputs are the float block's divided channel by channel by s [K]; the
            norm gains and the weights of the site before have taken 1 / s in.
    """

    block: Block
    weights: BlockWeights
    rope: Rope
    schemes: Mapping[str, QuantScheme]
    gains: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kv_bits(self) -> int:
        """Of the cache, one number for all sites."""
        return next(iter(self.schemes.values())).kv_bits


def site_weight(weights: BlockWeights, linears: Linears) -> tuple[Tensor, Tensor | None]:
    """Stacked weight [N, K] and bias [N] or None of a site."""
    parts = [weights[f"{name}.weight"] for name in linears.names]
    found = [weights.get(f"{name}.bias") for name in linears.names]
    bias = None
    if any(value is not None for value in found):
        bias = torch.cat(
            [
                part.new_zeros(len(part)) if value is None else value
                for part, value in zip(parts, found, strict=True)
            ]
        )
    return torch.cat(parts), bias


class _Stream:
    """One model's residual stream and how its steps compute."""

    def __init__(self, windows: Windows, context: Context) -> None:
        self.windows, self._context = windows, context

    def through(self, steps: Sequence[Step], x: Tensor) -> Tensor:
        """A window [L, K] sent through steps of a branch."""
        return run(steps, x[None], self._context).x[0]

    def add(self, index: int, steps: Sequence[Step], x: Tensor) -> None:
        """Move the window's residual stream on by what the last steps of a branch make of x."""
        residual = self.windows[index]
        self.windows[index] = run(steps, x[None], self._context, residual[None]).x[0]


class _Walk:
    """One branch: from the residual stream through its sites and back to it.

    Keys and values go through a low-bit cache in the quantised stream only.

    The first site's inputs are made anew from the residual stream when they are needed, and the
    float stream moves on while the last site's inputs are made, so nothing but the int8 codes of
    one site's inputs is kept.
    """

    def __init__(self, block: WalkBlock, branch: Branch, streams: Streams) -> None:
        self.block, self.branch, self.budget = block, branch, streams.budget
        heads = cached_heads(block.kv_bits)
        self.quant = _Stream(streams.quant, Context(block.gains, block.rope, heads=heads))
        self.real = None
        if streams.real is not None:
            self.real = _Stream(streams.real, Context(block.weights, block.rope))
        self.float_node = float_linear(block.weights, block.block)
        self.count = len(streams.quant)

    @property
    def end(self) -> tuple[Step, ...]:
        """The steps behind the last site."""
        return (*self.branch.tail, self.branch.add)

    def run(self, solve: Solve, measure: bool) -> dict[str, QuantArrays]:
        """All sites, and both streams past them."""
        found: dict[str, QuantArrays] = {}
        inputs: _Inputs = _FirstInputs(self)
        moments = self._first_moments(inputs) if measure else None
        if len(self.branch.sites) == 1:
            self._move_real()
        for number, site in enumerate(self.branch.sites):
            node = site.linears.node
            found[node] = solve(node, moments)
            linear = self._linear(node, found[node])
            if number + 1 < len(self.branch.sites):
                seen, moments = self._next_inputs(number + 1, linear, inputs, measure)
                _close(inputs)
                inputs = seen
        for index in range(self.count):
            self.quant.add(index, self.end, linear.multiply(inputs[index]))
        _close(inputs)
        return found

    def _first_moments(self, inputs: _Inputs) -> Moments:
        moments = self._moments(0)
        for index in range(self.count):
            self._add(moments, 0, inputs[index], self._real_input(0, index))
        return moments

    def _next_inputs(
        self,
        number: int,
        linear: FakeQuantLinear,
        inputs: _Inputs,
        measure: bool,
    ) -> tuple[ActivationWindows, Moments | None]:
        """Of site `number`, to be kept, and their moments, from the site before; the float stream
        moves on with the last site.
        """
        site, windows = self.branch.sites[number], self.quant.windows
        scheme = self.block.schemes[site.linears.node]
        moments = self._moments(number) if measure else None
        seen = ActivationWindows(
            self.budget,
            self.count,
            (windows.shape[1], site.linears.in_features),
            scheme,
            str(self.block.rope.cos.device),
        )
        last = number + 1 == len(self.branch.sites)
        for index in range(self.count):
            x = self.quant.through(site.lead, linear.multiply(inputs[index]))
            seen[index] = activation = Activation.of(x, scheme.abits, scheme.act_symmetric)
            wanted = self._real_input(number, index)
            if last and wanted is not None:
                assert self.real is not None
                self.real.add(index, self.end, self.float_node(site.linears.node, wanted))
            if moments is not None:
                self._add(moments, number, activation, wanted)
        return seen, moments

    def _real_input(self, number: int, index: int) -> Tensor | None:
        """What site `number` reads in the float model."""
        if self.real is None:
            return None
        x = self.real.through(self.branch.sites[0].lead, self.real.windows[index])
        for before, site in zip(self.branch.sites, self.branch.sites[1 : number + 1], strict=False):
            x = self.real.through(site.lead, self.float_node(before.linears.node, x))
        return x

    def _move_real(self) -> None:
        """The float stream past a branch of one site."""
        if self.real is None:
            return
        for index in range(self.count):
            x = self._real_input(0, index)
            assert x is not None
            self.real.add(index, self.end, self.float_node(self.branch.sites[0].linears.node, x))

    def _moments(self, number: int) -> Moments:
        size = self.branch.sites[number].linears.in_features
        return Moments(size, self.real is not None, str(self.block.rope.cos.device))

    def _add(self, moments: Moments, number: int, seen: Activation, wanted: Tensor | None) -> None:
        """A window into the moments of a site."""
        node = self.branch.sites[number].linears.node
        if wanted is not None and node in self.block.scales:
            wanted = wanted / self.block.scales[node]
        moments.add(seen.values(), wanted)

    def _linear(self, site: str, arrays: QuantArrays) -> FakeQuantLinear:
        scheme = self.block.schemes[site]
        quantizer = None
        if scheme.abits < 16:
            quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric)
        linear = FakeQuantLinear(QuantLinear(site, scheme, arrays), quantizer, exact=False)
        linear.to(self.block.rope.cos.device)
        return linear


class _FirstInputs:
    """What a branch's first site reads in the quantised model, made when asked for."""

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk

    def __getitem__(self, index: int) -> Activation:
        site, quant = self._walk.branch.sites[0], self._walk.quant
        scheme = self._walk.block.schemes[site.linears.node]
        x = quant.through(site.lead, quant.windows[index])
        return Activation.of(x, scheme.abits, scheme.act_symmetric)


_Inputs = _FirstInputs | ActivationWindows


def _close(inputs: _Inputs) -> None:
    if isinstance(inputs, ActivationWindows):
        inputs.close()


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
    found: dict[str, QuantArrays] = {}
    for branch in block.block.branches:
        found |= _Walk(block, branch, streams).run(solve, measure)
    return found
