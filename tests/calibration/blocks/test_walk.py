"""The walk through a block: every site is measured on what the kernel will see, after the sites
before it are quantised.
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
from calibration.blocks.forward import block_output, float_linear
from calibration.blocks.streams import StreamBudget
from calibration.blocks.walk import WalkBlock, site_weight, walk
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.solvers.grid import search_grid
from calibration.solvers.hessian import Moments
from plugins.core.op_spec import QuantArrays
from tests.calibration.block_cases import MODELS, QQQ, QQQ_GROUPS, W3A6, block_task, streams
from tests.calibration.llama import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    OUT,
    POST_NORM,
    QKV,
    SITES,
    attend,
    heads_from_qkv,
    mlp_product,
    rms_norm,
)

W3A16 = QuantScheme("ABQGemm", "qqq", 3, 16)


def _nearest(task: BlockTask) -> Callable[[str, object], QuantArrays]:
    def solve(site: str, moments: object) -> QuantArrays:
        weight, bias = site_weight(task.weights, task.block.sites[site].linears)
        grid = search_grid(weight, task.schemes[site], steps=1)
        group = torch.arange(weight.shape[1]) // (task.schemes[site].group_size or weight.shape[1])
        return grid.arrays(grid.round(weight, group)[0], bias)

    return solve


def _block(task: BlockTask, **changes: Any) -> WalkBlock:
    gains = {f"{norm}.weight": task.weights[f"{norm}.weight"] for norm in (INPUT_NORM, POST_NORM)}
    return replace(WalkBlock(task.block, task.weights, task.rope, task.schemes, gains), **changes)


def _step_by_step(
    task: BlockTask, arrays: dict[str, QuantArrays], x: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """One window through the quantised block, written out: what each site's kernel sees, and the
    stream behind the block.
    """
    seen: dict[str, Tensor] = {}

    def site(name: str, inputs: Tensor) -> Tensor:
        scheme = task.schemes[name]
        seen[name] = Activation.of(inputs, scheme.abits, scheme.act_symmetric).values()
        quantizer = (
            ActivationQuantizer(scheme.abits, scheme.act_symmetric) if scheme.abits < 16 else None
        )
        output: Tensor = FakeQuantLinear(
            QuantLinear(name, scheme, arrays[name]), quantizer, exact=False
        )(inputs)
        return output

    gains = (task.weights[f"{norm}.weight"] for norm in (INPUT_NORM, POST_NORM))
    qkv = site(QKV, rms_norm(x, next(gains)))
    x = x + site(OUT, attend(*heads_from_qkv(qkv[None], task.block, task.rope))[0])
    product = mlp_product(site(GATE_UP, rms_norm(x, next(gains))))
    return seen, x + site(DOWN, product)


@pytest.mark.parametrize(
    "scheme", [QQQ, QQQ_GROUPS, W3A6, W3A16], ids=lambda scheme: f"{scheme.op}-{scheme.label}"
)
@pytest.mark.parametrize(
    "changes", [MODELS["tied, grouped queries"], MODELS["biases"]], ids=["plain", "biases"]
)
def test_moments_are_of_quantised_inputs_behind_quantised_sites(
    tiny_llama: Callable[..., Path],
    changes: dict[str, Any],
    scheme: QuantScheme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published code of QQQ measures all sites in one float pass."""
    task = block_task(tiny_llama(**changes), scheme=scheme)
    inputs = [window.clone() for window in task.streams.quant]
    added: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(
        Moments, "add", lambda self, seen, wanted=None: added.append((seen, wanted))
    )
    arrays = walk(_block(task), task.streams, _nearest(task))
    assert list(arrays) == list(SITES) and len(added) == 4 * len(inputs)
    for index, x in enumerate(inputs):
        seen, output = _step_by_step(task, arrays, x)
        for place, name in enumerate(SITES):
            assert torch.equal(added[place * len(inputs) + index][0], seen[name]), name
        assert torch.equal(task.streams.quant[index], output)
    codes = {
        int((seen / seen.abs().amax(1, keepdim=True) * 127).round().unique().numel())
        for seen, _ in added
    }
    assert scheme.abits == 16 or max(codes) <= 255  # these are values of codes, not floats


def test_the_float_stream_is_the_float_models(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = block_task(tiny_model_dir)
    inputs = torch.stack(list(task.streams.quant))
    wanted: dict[str, Tensor] = {}

    def linear(site: str, x: Tensor) -> Tensor:
        wanted[site] = x
        return float_linear(task.weights, task.block)(site, x)

    output = block_output(inputs, task.weights, linear, task.block, task.rope)
    added: list[Tensor] = []
    monkeypatch.setattr(Moments, "add", lambda self, seen, real=None: added.append(real))
    scales = {OUT: torch.linspace(0.5, 2, 64), DOWN: torch.linspace(0.5, 2, 128)}
    walk(_block(task, scales=scales), task.streams, _nearest(task))
    assert task.streams.real is not None
    torch.testing.assert_close(torch.stack(list(task.streams.real)), output, rtol=1e-4, atol=1e-5)
    for place, site in enumerate(SITES):  # divided by the scales, as what the kernel sees is
        found = torch.stack(added[4 * place : 4 * place + 4])
        torch.testing.assert_close(
            found, wanted[site] / scales.get(site, torch.ones(())), rtol=1e-4, atol=1e-5
        )


def test_finished_codes_give_the_same_bits_without_measuring(tiny_model_dir: Path) -> None:
    first, again = block_task(tiny_model_dir), block_task(tiny_model_dir)
    arrays = walk(_block(first), first.streams, _nearest(first))
    walk(
        _block(again),
        again.streams,
        lambda site, moments: arrays[site] if moments is None else pytest.fail("measured"),
        measure=False,
    )
    for name in ("quant", "real"):
        assert all(
            torch.equal(a, b)
            for a, b in zip(getattr(first.streams, name), getattr(again.streams, name), strict=True)
        )


def test_without_a_float_stream_there_is_no_cross_moment(tiny_model_dir: Path) -> None:
    task = block_task(tiny_model_dir)
    task = replace(task, streams=streams(list(task.streams.quant), real=False))
    crosses = []

    def solve(site: str, moments: Moments | None) -> QuantArrays:
        assert moments is not None
        crosses.append(moments.cross)
        return _nearest(task)(site, moments)

    walk(_block(task), task.streams, solve)
    assert crosses == [None] * 4 and task.streams.real is None


@pytest.mark.parametrize("limit", [0, 40_000])
def test_activations_on_the_disk_are_the_same(
    tiny_model_dir: Path, tmp_path: Path, limit: int
) -> None:
    """Memory for one of the two streams, or for none: everything else goes through files."""
    memory, task = block_task(tiny_model_dir), block_task(tiny_model_dir)
    budget = StreamBudget(limit, tmp_path)
    disk = replace(task, streams=streams(list(task.streams.quant), budget))
    found = {}
    for name, one in (("memory", memory), ("disk", disk)):
        hessians: list[Tensor] = []

        def solve(
            site: str,
            moments: Moments | None,
            one: BlockTask = one,
            hessians: list[Tensor] = hessians,
        ) -> QuantArrays:
            assert moments is not None and moments.cross is not None
            hessians.extend((moments.hessian, moments.cross))
            return _nearest(one)(site, moments)

        walk(_block(one), one.streams, solve)
        assert one.streams.real is not None
        found[name] = [*hessians, *one.streams.quant, *one.streams.real]
    assert all(torch.equal(a, b) for a, b in zip(found["memory"], found["disk"], strict=True))
    assert budget.peak <= limit and budget.spilled > 0 and (budget.peak > 0) == (limit > 0)
    assert memory.streams.budget.spilled == 0
    held = memory.streams.budget.held
    assert held == 2 * 4 * 32 * 64 * 4  # the inputs of the sites are given back
    assert list(tmp_path.iterdir()) == []


def test_all_zero_tokens_stay_finite(tiny_model_dir: Path) -> None:
    """A padding token's embedding; the published code divides 0 by 0 there."""
    for scheme in (QQQ, W3A6):
        task = block_task(tiny_model_dir, scheme=scheme)
        x = list(task.streams.quant)
        x[1] = torch.zeros_like(x[1])
        x[2] = x[2].clone()
        x[2][5] = 0
        task = replace(task, streams=streams(x))
        measured: list[Moments] = []

        def solve(
            site: str,
            moments: Moments | None,
            task: BlockTask = task,
            measured: list[Moments] = measured,
        ) -> QuantArrays:
            assert moments is not None
            measured.append(moments)
            return _nearest(task)(site, moments)

        walk(_block(task), task.streams, solve)
        assert all(torch.isfinite(moments.hessian).all() for moments in measured)
        assert all(torch.isfinite(window).all() for window in task.streams.quant)
        assert torch.equal(task.streams.quant[1], torch.zeros(32, 64))
