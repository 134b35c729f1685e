"""The walk through a layer of experts: each is measured on its own tokens, or on all of them where
its own are too few.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.blocks.driver import BlockTask
from calibration.blocks.forward import block_output, float_linear, norm_gains
from calibration.blocks.walk import WalkBlock, site_weight, walk
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.solvers.grid import search_grid
from calibration.solvers.hessian import Moments
from plugins.core.op_spec import QuantArrays
from tests.calibration.block_cases import block_task
from tests.conftest import FAMILIES

W8 = QuantScheme("ABQGemm", "qqq", 8, 16)
MOE = "block_sparse_moe"


@pytest.fixture
def task(tiny_llama: Callable[..., Path]) -> BlockTask:
    """A layer of five experts and 4 windows of 32 tokens, in 8 bits, so that both streams agree."""
    model = tiny_llama(architecture="Mixtral", **FAMILIES["Mixtral"])
    return block_task(model, scheme=W8)


def walked(task: BlockTask) -> tuple[dict[str, Moments], dict[str, QuantArrays], list[str]]:
    """Moments and codes of every node, and notes; the streams are behind the block."""
    seen: dict[str, Moments] = {}

    def solve(site: str, moments: Moments | None) -> QuantArrays:
        assert moments is not None
        seen[site] = moments
        weight, bias = site_weight(task.weights, task.block.sites[site].linears)
        grid = search_grid(weight, W8, steps=1)
        return grid.arrays(
            grid.round(weight, torch.zeros(weight.shape[1], dtype=torch.long))[0], bias
        )

    notes: list[str] = []
    block = WalkBlock(
        task.block, task.weights, task.rope, task.schemes, norm_gains(task.weights, task.block)
    )
    return seen, walk(block, task.streams, solve, say=notes.append), notes


def inputs(
    task: BlockTask, codes: dict[str, QuantArrays]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What each node reads in all windows, and the stream behind the block, of the steps run as a
    whole with the weights that the codes stand for.
    """
    weights, seen = dict(task.weights), dict[str, Tensor]()
    for site, arrays in codes.items():
        names = task.block.sites[site].linears.names
        stacked = torch.from_numpy(QuantLinear(site, W8, arrays).dequantize())
        parts = stacked.split([len(task.weights[f"{name}.weight"]) for name in names])
        weights |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
    multiply = float_linear(weights, task.block)

    def node(site: str, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        seen[site] = torch.cat((seen[site], rows)) if site in seen else rows
        return multiply(site, x)

    outputs = [
        block_output(x[None], weights, node, task.block, task.rope)[0] for x in task.streams.quant
    ]
    return seen, outputs


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_an_expert_is_measured_on_its_own_tokens(task: BlockTask) -> None:
    before = [x.clone() for x in task.streams.quant]
    found, codes, notes = walked(task)
    behind = [x.clone() for x in task.streams.quant]
    for index, x in enumerate(before):
        task.streams.quant[index] = x
    seen, outputs = inputs(task, codes)
    assert list(found) == list(task.block.sites)
    counts = [len(seen[f"{MOE}.experts.{expert}.gate_up_proj"]) for expert in range(5)]
    few = [expert for expert, count in enumerate(counts) if count < 20]  # of 80 channels
    assert sum(counts) == 4 * 32 * 2
    said = [
        f"experts {', '.join(map(str, few))} saw few tokens, and were measured on all tokens of "
        "the layer"
    ]
    assert notes == (said if few else [])
    for site, moments in found.items():
        if not any(f".{expert}." in site for expert in few):
            want = seen[site].double().T @ seen[site].double()
            torch.testing.assert_close(moments.hessian, want, rtol=1e-3, atol=1e-3 * want.max())
    for got, want in zip(behind, outputs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3 * want.abs().max(), rtol=0)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_too_few_tokens_are_said_and_replaced_by_the_layers(task: BlockTask) -> None:
    task.weights[f"{MOE}.gate.weight"][:] = 0  # all scores are equal: the first two experts it is
    found, _, notes = walked(task)
    assert notes == ["experts 2, 3, 4 saw few tokens, and were measured on all tokens of the layer"]
    gate_up = [found[f"{MOE}.experts.{expert}.gate_up_proj"].hessian for expert in range(5)]
    for other in gate_up[1:]:  # the first two see all tokens by themselves
        torch.testing.assert_close(other, gate_up[0])
    down = [found[f"{MOE}.experts.{expert}.w2"].hessian for expert in (0, 2)]
    assert down[1].trace() > 0 and not torch.allclose(*down)
