"""Channel scales between a site's input and the weights before it, folded into weights: the same
function, smoother activations.

For every site the input x becomes x / s and the weight's columns are multiplied by s. The norm gain
(qkv, gate and up), the value rows (o_proj) or the up rows (down_proj) take 1 / s in, so nothing is
left to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
    attend,
    cached_heads,
    float_linear,
    heads_from_qkv,
    mlp_product,
    rms_norm,
)
from calibration.blocks.walk import site_weight
from calibration.reference.fake_quant import Activation
from calibration.solvers.grid import search_grid

if TYPE_CHECKING:
    from calibration.blocks.driver import BlockTask

__all__ = ["adaptive_scales", "clip_scales", "fold_scales", "site_outputs"]

_SOURCES = {QKV: INPUT_NORM, OUT: "self_attn.v_proj", GATE_UP: POST_NORM, DOWN: "mlp.up_proj"}
_STEPS = 40
_TOKENS = 4096  # of the calibration windows, for the search


def fold_scales(
    weights: BlockWeights, scales: Mapping[str, Tensor], shape: BlockShape
) -> BlockWeights:
    """The same block with the inputs of some sites divided by s [K]; at o_proj the query heads of a
    group must share theirs.
    """
    folded = dict(weights)
    for site, scale in scales.items():
        for name in SITES[site]:
            folded[f"{name}.weight"] = folded[f"{name}.weight"] * scale
        source = _SOURCES[site]
        before = _one_per_value(scale, shape) if site == OUT else scale
        rows = before if folded[f"{source}.weight"].ndim == 1 else before[:, None]
        folded[f"{source}.weight"] = folded[f"{source}.weight"] / rows
        if f"{source}.bias" in folded:
            folded[f"{source}.bias"] = folded[f"{source}.bias"] / before
    return folded


def _one_per_value(scale: Tensor, shape: BlockShape) -> Tensor:
    """[heads * d] -> [kv_heads * d]: the value channel that the query heads of a group read."""
    return scale.view(shape.kv_heads, shape.groups, shape.head_dim)[:, 0].flatten()


def _shared_by_groups(scale: Tensor, shape: BlockShape) -> Tensor:
    """Largest scale of the query heads that read the same value head, [heads * d] -> the same."""
    grouped = scale.view(shape.kv_heads, shape.groups, shape.head_dim)
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
    site: str, outputs: Tensor, task: BlockTask, heads: Heads = heads_from_qkv
) -> Tensor:
    """What the smoothing loss compares: attention of qkv, the product of gate and up, else the
    linear's own output.

    Args:
        heads: of the quantised block those that go through its cache.
    """
    if site == QKV:
        return attend(*heads(outputs[None], task.shape, task.rope))[0]
    return mlp_product(outputs) if site == GATE_UP else outputs


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
    state = [task.streams.quant[index] for index in range(count)]
    weights, found = dict(task.weights), {}

    def take(site: str, inputs: list[Tensor]) -> Callable[[int], Tensor]:
        if site in sites:
            found[site] = scale = _search(site, weights, inputs, task)
            weights.update(fold_scales(weights, {site: scale}, task.shape))
            inputs = [x / scale for x in inputs]
        quantised = _quantised(site, weights, task)
        return lambda index: quantised(inputs[index])

    def normed(norm: str) -> list[Tensor]:
        return [rms_norm(x, weights[f"{norm}.weight"], task.shape.epsilon) for x in state]

    qkv = take(QKV, normed(INPUT_NORM))
    cached = cached_heads(task.schemes[QKV].kv_bits)
    out = take(OUT, [site_outputs(QKV, qkv(index), task, cached) for index in range(count)])
    state = [x + out(index) for index, x in enumerate(state)]
    gate_up = take(GATE_UP, normed(POST_NORM))
    take(DOWN, [mlp_product(gate_up(index)) for index in range(count)])
    return found


def _quantised(site: str, weights: BlockWeights, task: BlockTask) -> Callable[[Tensor], Tensor]:
    """The site with round-to-nearest weights and quantised activations, in float arithmetic."""
    scheme = task.schemes[site]
    weight, bias = site_weight(weights, site)
    grid = search_grid(weight, scheme, steps=1)
    group = torch.arange(weight.shape[1], device=weight.device) // (
        scheme.group_size or weight.shape[1]
    )
    values = grid.round(weight, group)[1]
    return lambda x: torch.nn.functional.linear(
        Activation.of(x, scheme.abits, scheme.act_symmetric).values(), values, bias
    )


def _search(site: str, weights: BlockWeights, inputs: list[Tensor], task: BlockTask) -> Tensor:
    reaches = torch.zeros(
        2, weights[f"{SITES[site][0]}.weight"].shape[1], device=task.device
    )  # how far beyond 0, down and up
    for x in inputs:
        reaches = torch.maximum(reaches, torch.stack((-x.amin(0), x.amax(0))))
    task.ranks.largest(reaches)
    (low, high), reach = (-reaches[0], reaches[1]), float(reaches.max())
    exact = [site_outputs(site, float_linear(weights)(site, x), task) for x in inputs]
    best, found, cached = (
        float("inf"),
        torch.ones_like(high),
        cached_heads(task.schemes[QKV].kv_bits),
    )
    for step in range(_STEPS):
        threshold = reach * (1 - step / _STEPS)
        if reach == 0:
            break
        scale = clip_scales(low, high, threshold)
        scale = _shared_by_groups(scale, task.shape) if site == OUT else scale
        scaled = {f"{name}.weight": weights[f"{name}.weight"] * scale for name in SITES[site]}
        quantised = _quantised(site, weights | scaled, task)
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        for x, wanted in zip(inputs, exact, strict=True):
            total += (
                (site_outputs(site, quantised(x / scale), task, cached) - wanted)
                .double()
                .square()
                .sum()
            )
        task.ranks.sum([total])
        if total < best:  # False for NaN
            best, found = float(total), scale
    return found
