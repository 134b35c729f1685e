"""Channel scales between a site's input and the weights before it, folded into weights: the same
function, smoother activations.

For every site the input x becomes x / s and the weight's columns are multiplied by s. The norm gain
(qkv, gate and up), the value rows (o_proj) or the up rows (down_proj) take 1 / s in, so nothing is
left to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibration.blocks.forward import BlockWeights, float_linear
from calibration.blocks.walk import site_weight
from calibration.families.decoder import Block, Branch, Site
from calibration.families.steps import Experts, Gate, Heads, Norm
from calibration.reference.fake_quant import Activation
from calibration.reference.steps import PLAIN, Context, HeadHook, cached_heads, routed, run
from calibration.solvers.grid import column_groups, search_grid

if TYPE_CHECKING:
    from calibration.blocks.driver import BlockTask

__all__ = ["adaptive_scales", "clip_scales", "fold_scales", "site_outputs", "smoothed_sites"]

_STEPS = 40
_TOKENS = 4096  # of the calibration windows, for the search


def smoothed_sites(which: str, block: Block) -> tuple[str, ...]:
    """The sites that can be smoothed: "all", "down" (those behind a gate), or "none"."""
    if which == "none":
        return ()
    return tuple(
        node
        for node, site in block.sites.items()
        if site.source is not None
        and (which == "all" or any(isinstance(step, Gate) for step in site.lead))
    )


def fold_scales(weights: BlockWeights, scales: Mapping[str, Tensor], block: Block) -> BlockWeights:
    """The same block with the inputs of some sites divided by s [K]; behind attention the query
    heads of a group must share theirs.
    """
    folded = dict(weights)
    for node, scale in scales.items():
        site = block.sites[node]
        for name in site.linears.names:
            folded[f"{name}.weight"] = folded[f"{name}.weight"] * scale
        if isinstance(site.source, Norm):
            folded[site.source.gain] = folded[site.source.gain] / scale
            continue
        assert site.source is not None, f"{node}: nothing takes its scales in"
        source = site.source.name
        before = _one_per_value(scale, block.heads) if site.by_value_head else scale
        folded[f"{source}.weight"] = folded[f"{source}.weight"] / before[:, None]
        if f"{source}.bias" in folded:
            folded[f"{source}.bias"] = folded[f"{source}.bias"] / before
    return folded


def _one_per_value(scale: Tensor, heads: Heads) -> Tensor:
    """[heads * d] -> [kv_heads * d]: the value channel that the query heads of a group read."""
    return scale.view(heads.kv_heads, heads.groups, heads.head_dim)[:, 0].flatten()


def _shared_by_groups(scale: Tensor, heads: Heads) -> Tensor:
    """Largest scale of the query heads that read the same value head, [heads * d] -> the same."""
    grouped = scale.view(heads.kv_heads, heads.groups, heads.head_dim)
    return grouped.amax(1, keepdim=True).expand_as(grouped).flatten()


def clip_scales(low: Tensor, high: Tensor, threshold: float) -> Tensor:
    """s_c = max(1, high_c / t, low_c / -t): only channels that reach beyond t are shrunk (QQQ
    section 3.1, after OS+).

    Args:
        low, high: smallest and largest activation of each channel [K].
        threshold: t > 0.
    """
    return torch.maximum(high / threshold, -low / threshold).clamp(min=1.0)


def site_outputs(
    node: str, outputs: Tensor, task: BlockTask, heads: HeadHook | None = None
) -> Tensor:
    """What the smoothing loss compares: the next site's input, such as attention's output for qkv
    and the product for gate and up; behind a branch's last site its own output.

    Args:
        node: the site.
        outputs: [L, N], its own.
        task: the block.
        heads: of the quantised block those that go through its cache.
    """
    return run(task.block.after(node), outputs[None], _context(task.weights, task, heads)).x[0]


def _context(
    gains: Mapping[str, Tensor], task: BlockTask, heads: HeadHook | None = None
) -> Context:
    return Context(gains, task.rope) if heads is None else Context(gains, task.rope, heads=heads)


@torch.no_grad()  # type: ignore[untyped-decorator]
def adaptive_scales(task: BlockTask, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """Scales of some sites, each by a search over clip thresholds that sees the sites before it
    smoothed and quantised.

    Loss: squared difference of the site's output from the float one's, with activations and weights
    (round to nearest) quantised. Several processes search together on the windows that one alone
    would take.
    """
    together = max(1, _TOKENS // task.streams.quant.shape[1])
    count = min(len(task.streams.quant), len(task.ranks.share(together)))
    search = _Search(task, sites, [task.streams.quant[index] for index in range(count)])
    for branch in task.block.branches:
        search.past(branch)
    return search.found


class _Search:
    """The search's model: the block with what was found so far folded in, and its inputs."""

    def __init__(self, task: BlockTask, sites: tuple[str, ...], state: list[Tensor]) -> None:
        self.task, self._sites, self._state = task, sites, state
        self._weights = dict(task.weights)
        self._cached = cached_heads(task.kv_bits)
        self.found: dict[str, Tensor] = {}

    def past(self, branch: Branch) -> None:
        """Find the scales of a branch's sites, and move the residual stream past it; experts are
        the end of a block.
        """
        if branch.experts is None:
            outputs = self._through(branch.chains[0], self._state)
        else:
            self._into_experts(branch, branch.experts)
        if branch is not self.task.block.branches[-1]:
            end, context = (*branch.tail, branch.add), _context(self._weights, self.task)
            self._state = [
                run(end, outputs(index)[None], context, x[None]).x[0]
                for index, x in enumerate(self._state)
            ]

    def _into_experts(self, branch: Branch, experts: Experts) -> None:
        """Each expert with its own tokens."""
        context, routes = _context(self._weights, self.task), list[tuple[Tensor, Tensor]]()
        for window in self._state:
            x = run(branch.lead, window[None], context).x[0]
            scores = PLAIN.scores(x, self._weights[experts.weight])
            routes.append((x, routed(scores, experts)[0]))
        for expert, chain in enumerate(branch.chains):
            rows = [x[(chosen == expert).any(-1)] for x, chosen in routes]
            self._through(chain, [part for part in rows if len(part)])

    def _through(self, chain: Sequence[Site], values: list[Tensor]) -> Callable[[int], Tensor]:
        """Find the scales of sites behind each other; what the last one makes of a value."""
        first, *others = chain
        context = _context(self._weights, self.task)
        inputs = [run(first.lead, x[None], context).x[0] for x in values]
        outputs = self._take(first, inputs)
        for before, site in pairwise((first, *others)):
            node = before.linears.node
            inputs = [
                site_outputs(node, outputs(index), self.task, self._cached)
                for index in range(len(inputs))
            ]
            outputs = self._take(site, inputs)
        return outputs

    def _take(self, site: Site, inputs: list[Tensor]) -> Callable[[int], Tensor]:
        node = site.linears.node
        if node in self._sites:
            self.found[node] = scale = _search(site, self._weights, inputs, self.task)
            self._weights.update(fold_scales(self._weights, {node: scale}, self.task.block))
            inputs = [x / scale for x in inputs]
        quantised = _quantised(site, self._weights, self.task)
        return lambda index: quantised(inputs[index])


def _quantised(site: Site, weights: BlockWeights, task: BlockTask) -> Callable[[Tensor], Tensor]:
    """The site with round-to-nearest weights and quantised activations, in float arithmetic."""
    scheme = task.schemes[site.linears.node]
    weight, bias = site_weight(weights, site.linears)
    grid = search_grid(weight, scheme, steps=1)
    values = grid.round(weight, column_groups(weight, scheme))[1]
    return lambda x: torch.nn.functional.linear(
        Activation.of(x, scheme.abits, scheme.act_symmetric).values(), values, bias
    )


def _search(site: Site, weights: BlockWeights, inputs: list[Tensor], task: BlockTask) -> Tensor:
    node, names = site.linears.node, site.linears.names
    # how far the inputs reach beyond 0, down and up
    reaches = torch.zeros(2, site.linears.in_features, device=task.device)
    for x in inputs:
        reaches = torch.maximum(reaches, torch.stack((-x.amin(0), x.amax(0))))
    task.ranks.largest(reaches)
    (low, high), reach = (-reaches[0], reaches[1]), float(reaches.max())
    multiply = float_linear(weights, task.block)
    exact = [site_outputs(node, multiply(node, x), task) for x in inputs]
    best, found, cached = float("inf"), torch.ones_like(high), cached_heads(task.kv_bits)
    for step in range(_STEPS):
        threshold = reach * (1 - step / _STEPS)
        if reach == 0:
            break
        scale = clip_scales(low, high, threshold)
        scale = _shared_by_groups(scale, task.block.heads) if site.by_value_head else scale
        scaled = {f"{name}.weight": weights[f"{name}.weight"] * scale for name in names}
        quantised = _quantised(site, weights | scaled, task)
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        for x, wanted in zip(inputs, exact, strict=True):
            got = site_outputs(node, quantised(x / scale), task, cached)
            total += (got - wanted).double().square().sum()
        task.ranks.sum([total])
        if total < best:  # False for NaN
            best, found = float(total), scale
    return found
