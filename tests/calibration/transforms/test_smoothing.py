"""Smoothing: scales folded into weights leave the function, also where queries share keys, and tame
outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.blocks.driver import BlockTask
from calibration.blocks.forward import BlockWeights, block_output, float_linear, load_block
from calibration.blocks.ranks import Ranks
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.transforms.smoothing import adaptive_scales, clip_scales, fold_scales
from tests.calibration.block_cases import MODELS, block_task, streams
from tests.calibration.llama import DOWN, GATE_UP, INPUT_NORM, OUT, QKV, SITES

ALL = tuple(SITES)


def _scales(task: BlockTask, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """Factors from 1/4 to 4; query heads that read the same value head share theirs."""
    generator, heads, found = torch.Generator().manual_seed(0), task.block.heads, {}
    for site in sites:
        width = task.weights[f"{SITES[site][0]}.weight"].shape[1]
        found[site] = 4 ** (2 * torch.rand(width, generator=generator) - 1)
        if site == OUT:
            one = found[site].view(heads.kv_heads, heads.groups, heads.head_dim)[:, :1]
            found[site] = one.expand(-1, heads.groups, -1).flatten()
    return found


def _run(task: BlockTask, weights: BlockWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output over all windows, and the input of each site."""
    seen: dict[str, Tensor] = {}

    def linear(site: str, x: Tensor) -> Tensor:
        seen[site] = x
        return float_linear(weights, task.block)(site, x)

    return block_output(
        torch.stack(list(task.streams.quant)), weights, linear, task.block, task.rope
    ), seen


@pytest.mark.parametrize(
    "sites",
    [*((site,) for site in ALL), ALL],
    ids=lambda sites: sites[0] if len(sites) == 1 else "all",
)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_folded_scales_leave_the_function(
    tiny_llama: Callable[..., Path], changes: dict[str, Any], sites: tuple[str, ...]
) -> None:
    task = block_task(tiny_llama(**changes))
    scales = _scales(task, sites)
    before, seen = _run(task, task.weights)
    after, smoothed = _run(task, fold_scales(task.weights, scales, task.block))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    for site in ALL:
        wanted = seen[site] / scales.get(site, torch.ones(()))
        assert (smoothed[site] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_scale_that_is_dropped_on_one_side_shows(tiny_model_dir: Path) -> None:
    """What the published code does to o_proj where queries share keys; so the test above cannot
    pass by being loose.
    """
    task = block_task(tiny_model_dir)
    folded = fold_scales(task.weights, _scales(task, (OUT,)), task.block)
    before = _run(task, task.weights)[0]
    for dropped in ("self_attn.o_proj.weight", "self_attn.v_proj.weight"):
        after = _run(task, folded | {dropped: task.weights[dropped]})[0]
        assert (after - before).abs().max() > 0.05 * before.abs().max()


def test_clip_scales_shrink_what_reaches_beyond() -> None:
    low, high = torch.tensor([-8.0, -1.0, 0.0, -2.0]), torch.tensor([1.0, 2.0, 0.0, 6.0])
    torch.testing.assert_close(clip_scales(low, high, 2.0), torch.tensor([4.0, 1.0, 1.0, 3.0]))
    assert torch.equal(clip_scales(low, high, 8.0), torch.ones(4))


def _outlier_task(folder: Path) -> BlockTask:
    """Channel 3 of the first norm 60 times as large, and value row 5 (of the second key-value
    head's channel) 80 times.
    """
    weights = load_block(open_checkpoint(str(folder), offline=True), 0)
    weights[f"{INPUT_NORM}.weight"][3] *= 60
    weights["self_attn.v_proj.weight"][21] *= 80
    return block_task(folder, weights=weights)


def test_outlier_channels_are_found_and_shared_by_the_queries_of_a_key(
    tiny_model_dir: Path,
) -> None:
    task = _outlier_task(tiny_model_dir)
    scales = adaptive_scales(task, ALL)
    assert list(scales) == list(ALL)
    assert all((scale >= 1).all() for scale in scales.values())
    assert int(scales[QKV].argmax()) == 3 and scales[QKV][3] > 1.5
    heads = scales[OUT].view(2, 2, 16)  # [kv_heads, queries per key, head_dim]
    assert torch.equal(heads[:, 0], heads[:, 1]) and heads[1, 0, 5] == scales[OUT].max() > 1.5
    for site, scale in scales.items():  # and all of them fold
        before, after = (
            _run(task, task.weights)[0],
            _run(task, fold_scales(task.weights, {site: scale}, task.block))[0],
        )
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_only_the_sites_that_are_asked_for(tiny_model_dir: Path) -> None:
    task = _outlier_task(tiny_model_dir)
    assert adaptive_scales(task, ()) == {}
    assert list(adaptive_scales(task, (DOWN,))) == [DOWN]
    inputs = [window.clone() for window in task.streams.quant]
    adaptive_scales(task, ALL)
    assert all(
        torch.equal(before, after) for before, after in zip(inputs, task.streams.quant, strict=True)
    )


class _Two(Ranks):
    """One of two processes that wait for nobody: what the other one brings is known beforehand."""

    def sum(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor *= 2

    def largest(self, tensor: Tensor) -> None:
        pass


def test_processes_search_on_the_windows_that_one_alone_would_take(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _outlier_task(tiny_model_dir)
    monkeypatch.setattr("calibration.transforms.smoothing._TOKENS", 64)  # two windows
    windows = list(task.streams.quant)
    alone = adaptive_scales(replace(task, streams=streams([windows[0], windows[0]])), ALL)
    together = adaptive_scales(
        replace(task, streams=streams(windows), ranks=_Two(0, 2)), ALL
    )  # the first window, counted twice
    assert all(torch.equal(alone[site], together[site]) for site in ALL)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_activations_that_say_nothing_scale_nothing(tiny_model_dir: Path, value: float) -> None:
    task = block_task(tiny_model_dir)
    task = replace(task, streams=streams([torch.full((32, 64), value)] * 2))
    assert all(
        torch.equal(scale, torch.ones_like(scale))
        for scale in adaptive_scales(task, (QKV, GATE_UP)).values()
    )
