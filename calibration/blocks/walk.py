"""Walks all calibration windows through one block, site by site: each site is quantised on inputs
that come from quantised ones before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, float_linear
from calibration.blocks.ranks import ALONE, Ranks
from calibration.blocks.streams import ActivationWindows, StreamBudget, Windows
from calibration.families.decoder import Block, Branch, Site
from calibration.families.steps import Linears, Step
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.reference.steps import PLAIN, Context, Rope, cached_heads, routed, run
from calibration.solvers.hessian import Moments
from plugins.core.op_spec import QuantArrays
from plugins.text import some

__all__ = ["Streams", "WalkBlock", "site_weight", "walk"]

# Of an expert's input channels: with fewer tokens than this part of them GPTQ goes by its damping
# more than by what it saw.
_FEWEST = 4

Solve = Callable[[str, "Moments | None"], QuantArrays]


@dataclass
class Streams:
    """The residual stream before a block, of this process's windows: quantised model, and float
    model where the method wants it.

    Attributes:
        quant, real: [n][L, hidden] fp32; real is None for methods that do not look at the float
            model's activations.
        budget: where scratch activations come from.
        ranks: the processes that share the windows.
    """

    quant: Windows
    real: Windows | None
    budget: StreamBudget
    ranks: Ranks = ALONE

    @property
    def all(self) -> tuple[Windows, ...]:
        """Both, as far as there are."""
        return (self.quant,) if self.real is None else (self.real, self.quant)


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

    def rows(self, steps: Sequence[Step], index: int, tokens: Tensor) -> Tensor:
        """Some tokens of a window, [n, K] behind steps that take each by itself."""
        return self.through(steps, self.windows[index][tokens])

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
        self.float_node = float_linear(block.weights, block.block)
        if streams.real is not None:
            self.real = _Stream(streams.real, Context(block.weights, block.rope, self.float_node))
        self.count = len(streams.quant)
        self.ranks = streams.ranks

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
        return self._moments_of(self.branch.sites[number])

    def _moments_of(self, site: Site) -> Moments:
        size = site.linears.in_features
        return Moments(size, self.real is not None, str(self.block.rope.cos.device))

    def _add(self, moments: Moments, number: int, seen: Activation, wanted: Tensor | None) -> None:
        """A window into the moments of a site."""
        self._add_to(moments, self.branch.sites[number].linears.node, seen, wanted)

    def _add_to(self, moments: Moments, node: str, seen: Activation, wanted: Tensor | None) -> None:
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


class _ExpertsWalk(_Walk):
    """A branch of experts, one after the other, each on the tokens that the quantised model routes
    to it.

    What an expert's nodes read is made anew from the residual stream when it is needed; what is
    kept is where the tokens go, and the sum of what the experts so far made.

    Attributes:
        few: experts that too few tokens reached, and which were therefore measured on all tokens of
            the layer.
    """

    def __init__(self, block: WalkBlock, branch: Branch, streams: Streams) -> None:
        super().__init__(block, branch, streams)
        assert branch.experts is not None
        self._experts = branch.experts
        self._routes = list[tuple[Tensor, Tensor]]()  # [L, top] each, of every window
        counts = torch.zeros(len(branch.chains), device=block.rope.cos.device)
        for window in streams.quant:
            x = self.quant.through(branch.lead, window)
            scores = PLAIN.scores(x, block.gains[self._experts.weight])
            chosen, weights = routed(scores, self._experts)
            self._routes.append((chosen.to(torch.int16), weights))
            counts += torch.bincount(chosen.flatten(), minlength=len(counts))
        self.ranks.sum([counts])
        fewest = -(-branch.sites[0].linears.in_features // _FEWEST)
        self.few = [index for index, count in enumerate(counts.tolist()) if count < fewest]

    def run(self, solve: Solve, measure: bool) -> dict[str, QuantArrays]:
        """All experts, and both streams past them."""
        found: dict[str, QuantArrays] = {}
        total = self.budget.windows(self.count, self.quant.windows.shape[1:])
        for window in range(self.count):
            total[window] = torch.zeros(self.quant.windows.shape[1:])
        for expert, chain in enumerate(self.branch.chains):
            made = list[tuple[Site, FakeQuantLinear]]()
            for site in chain:
                node = site.linears.node
                found[node] = solve(node, self._seen(expert, site, made) if measure else None)
                made.append((site, self._linear(node, found[node])))
            for window, (chosen, weights) in enumerate(self._routes):
                tokens, places = (chosen == expert).nonzero(as_tuple=True)
                if len(tokens):
                    y = self._through(made, window, tokens) * weights[tokens, places, None]
                    total[window] = total[window].index_add(0, tokens, y)
        if self.real is not None:
            steps = (*self.branch.lead, self._experts, *self.end)
            for window in range(self.count):
                self.real.add(window, steps, self.real.windows[window])
        for window in range(self.count):
            self.quant.add(window, self.end, total[window])
        total.close()
        return found

    def _seen(
        self, expert: int, site: Site, made: Sequence[tuple[Site, FakeQuantLinear]]
    ) -> Moments:
        """Of what a node of an expert reads behind its nodes so far."""
        moments, scheme = self._moments_of(site), self.block.schemes[site.linears.node]
        for window, (chosen, _) in enumerate(self._routes):
            reached = (chosen == expert).any(-1) | (expert in self.few)
            tokens = reached.nonzero()[:, 0]
            if len(tokens):
                x = self._through(made, window, tokens)
                x = self.quant.through(site.lead, x)
                activation = Activation.of(x, scheme.abits, scheme.act_symmetric)
                wanted = self._wanted(site, [before for before, _ in made], window, tokens)
                self._add_to(moments, site.linears.node, activation, wanted)
        return moments

    def _through(
        self, made: Sequence[tuple[Site, FakeQuantLinear]], window: int, tokens: Tensor
    ) -> Tensor:
        """What the nodes so far make of some tokens of a window, [n, N]; without any the value
        itself.
        """
        x = self.quant.rows(self.branch.lead, window, tokens)
        for site, linear in made:
            x = linear(self.quant.through(site.lead, x))
        return x

    def _wanted(
        self, site: Site, before: Sequence[Site], window: int, tokens: Tensor
    ) -> Tensor | None:
        """What a node reads of these tokens in the float model."""
        if self.real is None:
            return None
        x = self.real.rows(self.branch.lead, window, tokens)
        for one in before:
            x = self.float_node(one.linears.node, self.real.through(one.lead, x))
        return self.real.through(site.lead, x)


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
    block: WalkBlock,
    streams: Streams,
    solve: Solve,
    measure: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, QuantArrays]:
    """Quantise the sites in execution order and move both streams past the block, in place.

    Args:
        block: what to walk.
        streams: the residual streams before the block; afterwards those behind it.
        solve: codes of a site from the moments of its inputs (None without `measure`). Looking up
            finished codes gives the very bits of the first run, which is how a killed calibration
            goes on.
        measure: sum up moments.
        say: what to do with a note on experts that too few tokens reached.

    Returns:
        What `solve` gave, by site, members stacked along N.
    """
    found: dict[str, QuantArrays] = {}
    for branch in block.block.branches:
        if branch.experts is None:
            found |= _Walk(block, branch, streams).run(solve, measure)
            continue
        experts = _ExpertsWalk(block, branch, streams)
        if experts.few and say is not None:
            say(
                f"experts {some([str(index) for index in experts.few])} saw few tokens, and were "
                "measured on all tokens of the layer"
            )
        found |= experts.run(solve, measure)
    return found
