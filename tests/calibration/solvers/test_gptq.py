"""GPTQ: equal to the algorithm written out, better than rounding to nearest, and sane on Hessians
that are not.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.quant.scheme import QuantScheme
from calibration.solvers.gptq import GptqResult, factored, gptq, quadratic_error
from calibration.solvers.grid import Grid, search_grid
from calibration.solvers.hessian import Moments
from tests.calibration.block_cases import QQQ, QQQ_GROUPS

W3 = QuantScheme("ABQGemm", "abq", 3, 8)
W2_GROUPS = QuantScheme("ABQGemm", "abq", 2, 8, True, 32)
SCHEMES = [QQQ, QQQ_GROUPS, W3, W2_GROUPS]
NEAREST = "no usable calibration inputs, rounded to nearest"


def _inputs(tokens: int = 400, size: int = 192) -> Tensor:
    """Correlated, with a few strong channels."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(tokens, size // 4, generator=generator) @ torch.randn(
        size // 4, size, generator=generator
    )
    return (low + 0.5 * torch.randn(tokens, size, generator=generator)) * (
        1 + 5 * (torch.rand(size, generator=generator) > 0.95)
    )


def _case(scheme: QuantScheme, size: int = 192) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Weight [24, size], Hessian, grid, group of each column."""
    weight = torch.randn(24, size, generator=torch.Generator().manual_seed(1))
    x = _inputs(size=size).double()
    return (
        weight,
        x.T @ x,
        search_grid(weight, scheme, steps=1),
        torch.arange(size) // (scheme.group_size or size),
    )


def _gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    group: Tensor,
    damp: float = 0.01,
    act_order: bool = True,
) -> GptqResult:
    return gptq(weight, factored(hessian, damp, act_order), grid, group)


def _written_out(weight: Tensor, hessian: Tensor, grid: Grid, group: Tensor, damp: float) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 in blocks of one column, without reordering: codes [N, K]."""
    size = len(hessian)
    damped = hessian.double() + damp * torch.diagonal(hessian).mean() * torch.eye(
        size, dtype=torch.float64
    )
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for k in range(size):
        codes[:, k], value = grid.round(left[:, k].float(), int(group[k]))
        error = (left[:, k] - value) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_codes_are_those_of_the_algorithm_written_out(scheme: QuantScheme) -> None:
    weight, hessian, grid, group = _case(scheme)
    result = _gptq(weight, hessian, grid, group, damp=0.02, act_order=False)
    assert torch.equal(result.codes, _written_out(weight, hessian, grid, group, 0.02))
    assert not torch.equal(result.codes, grid.round(weight, group)[0]) and result.note == ""


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_descending_order_keeps_static_groups(scheme: QuantScheme) -> None:
    """Columns put in order by hand, each with its group, give the same; put back, the groups lie as
    the op has them.
    """
    weight, hessian, grid, group = _case(scheme)
    result = _gptq(weight, hessian, grid, group, damp=0.02)
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    by_hand = _written_out(weight[:, order], hessian[order][:, order], grid, group[order], 0.02)
    assert torch.equal(result.codes[:, order], by_hand)
    assert torch.equal(grid.values(result.codes, group), result.values)
    assert not torch.equal(
        result.codes, _gptq(weight, hessian, grid, group, damp=0.02, act_order=False).codes
    )


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_output_error_is_below_that_of_nearest_and_is_the_ops_own(
    scheme: QuantScheme, act_order: bool
) -> None:
    """The error counted with the op's weights: with groups the published code re-rounds to int8
    when GPTQ is over.
    """
    from calibration.quant.scheme import QuantLinear

    weight, hessian, grid, group = _case(scheme)
    result = _gptq(weight, hessian, grid, group, act_order=act_order)
    stored = torch.from_numpy(
        QuantLinear("test", scheme, grid.arrays(result.codes, None)).dequantize()
    )
    assert torch.equal(stored, result.values)
    x, nearest = _inputs(), grid.round(weight, group)[1]
    error = quadratic_error(weight, stored, hessian)
    assert error < 0.6 * quadratic_error(weight, nearest, hessian)
    assert error == pytest.approx(
        float((x @ (stored - weight).T).double().square().sum()), rel=1e-3
    )


def test_a_diagonal_hessian_leaves_nothing_to_make_up_for() -> None:
    weight, _, grid, group = _case(QQQ)
    result = _gptq(weight, torch.diag(torch.rand(192) + 0.1), grid, group)
    assert torch.equal(result.codes, grid.round(weight, group)[0])


def test_no_order_of_the_windows_changes_a_code() -> None:
    weight, _, grid, group = _case(QQQ)
    found = []
    for windows in (
        _inputs().split(50),
        _inputs().split(50)[::-1],
        [*_inputs().split(50)[1::2], *_inputs().split(50)[::2]],
    ):
        moments = Moments(192, cross=False)
        for window in windows:
            moments.add(window)
        found.append(_gptq(weight, moments.hessian, grid, group).codes)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_hessian_does_not_count(scale: float) -> None:
    weight, hessian, grid, group = _case(QQQ)
    hessian[7] = hessian[:, 7] = 0  # nor that a dead channel stands beside
    assert torch.equal(
        _gptq(weight, hessian * scale, grid, group).codes, _gptq(weight, hessian, grid, group).codes
    )


# ---------------------------------------------------------------- Hessians that are not


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_a_hessian_that_says_nothing(scheme: QuantScheme, value: float) -> None:
    weight, _, grid, group = _case(scheme)
    result = _gptq(weight, torch.full((192, 192), value), grid, group)
    codes, values = grid.round(weight, group)
    assert (
        torch.equal(result.codes, codes)
        and torch.equal(result.values, values)
        and result.note == NEAREST
    )


def test_one_nan_in_a_hessian() -> None:
    weight, hessian, grid, group = _case(QQQ)
    hessian[3, 4] = float("nan")
    assert _gptq(weight, hessian, grid, group).note == NEAREST


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weight, _, grid, group = _case(QQQ)
    x = _inputs(tokens=3).double()
    usual = _gptq(weight, x.T @ x, grid, group)
    assert usual.note == ""
    result = _gptq(weight, x.T @ x, grid, group, damp=0.0)
    assert result.note == "singular Hessian, damped by 0.001 of its mean diagonal"
    assert torch.isfinite(result.values).all()
    assert quadratic_error(weight, result.values, x.T @ x) < quadratic_error(
        weight, grid.round(weight, group)[1], x.T @ x
    )


def test_a_hessian_that_no_damping_saves() -> None:
    weight, hessian, grid, group = _case(QQQ)
    hessian[0, 1] = hessian[1, 0] = 1e9 * hessian.abs().max()
    result = _gptq(weight, hessian, grid, group)
    assert result.note == "singular Hessian, rounded to nearest"
    assert torch.equal(result.codes, grid.round(weight, group)[0])


def test_dead_channels_get_the_code_nearest_to_zero_and_disturb_nobody() -> None:
    weight, hessian, grid, group = _case(W3)
    live = torch.ones(192, dtype=torch.bool)
    live[[0, 50, 191]] = False
    hessian[~live] = hessian[:, ~live] = 0
    result = _gptq(weight, hessian, grid, group, act_order=False)
    assert torch.equal(result.codes[:, ~live], grid.round(torch.zeros(24, 3), group[~live])[0])
    alone = _gptq(weight[:, live], hessian[live][:, live], grid, group[live], act_order=False)
    assert torch.equal(result.codes[:, live], alone.codes) and result.note == ""


def test_rows_of_zeros_stay_zero() -> None:
    weight, hessian, _, group = _case(QQQ)
    weight[5] = 0
    for scheme in SCHEMES:
        grid = search_grid(weight, scheme)
        group = torch.arange(192) // (scheme.group_size or 192)
        result = _gptq(weight, hessian, grid, group)
        assert (result.values[5] == 0).all() and torch.isfinite(result.values).all()
