"""Grids: what is rounded on them is what the op computes, bit for bit, and a search never does
worse than min/max.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.solvers.gptq import quadratic_error
from calibration.solvers.grid import Grid, search_grid
from plugins import op_spec
from plugins.abq_gemm.grid import AbqGrid
from plugins.core.op_spec import QuantArrays
from plugins.qqq_gemm.grid import QqqGrid
from tests.calibration.block_cases import QQQ, QQQ_GROUPS

ABQ = [
    QuantScheme("ABQGemm", "abq", wbits, 8, balanced, group)
    for wbits, balanced in (
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (8, False),
    )
    for group in (0, 32)
]
ALL = [QQQ, QQQ_GROUPS, *ABQ]
FAR = {"plain": 1.0, "tiny": 1e-30, "huge": 1e30}


def _weight(scheme: QuantScheme, rows: int = 12) -> Tensor:
    """[rows, 128] with rows of every kind: heavy tails, one sign only, all zero, constant, far from
    zero.
    """
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0)) ** 3
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    weight[3] = 0
    weight[4] = 0.7
    weight[5] = 100 + weight[5] * 0.01
    weight[6, 9] = 40.0
    return weight


def _group(scheme: QuantScheme, columns: int = 128) -> Tensor:
    return torch.arange(columns) // (scheme.group_size or columns)


def _dequantized(arrays: QuantArrays, scheme: QuantScheme) -> Tensor:
    return torch.from_numpy(QuantLinear("test", scheme, arrays).dequantize())


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("factor", FAR.values(), ids=FAR)
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_values_are_those_of_the_op_bit_for_bit(
    scheme: QuantScheme, factor: float, steps: int
) -> None:
    weight, group = _weight(scheme) * factor, _group(scheme)
    grid = search_grid(weight, scheme, steps=steps)
    codes, values = grid.round(weight, group)
    arrays = grid.arrays(codes, None)
    assert torch.equal(values, _dequantized(arrays, scheme))
    assert torch.equal(grid.values(codes, group), values)
    assert torch.isfinite(values).all()
    low, high = (-8, 7) if scheme.op == "QQQGemm" else (0, scheme.levels - 1)
    assert low <= int(arrays.codes.min()) and int(arrays.codes.max()) <= high
    for column in (0, 50, 127):  # GPTQ rounds column by column on the same grid
        one = grid.round(weight[:, column], int(group[column]))
        assert torch.equal(one[0], codes[:, column]) and torch.equal(one[1], values[:, column])


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_codes_reach_the_packed_words_and_come_back(scheme: QuantScheme) -> None:
    weight = _weight(scheme)
    grid = search_grid(weight, scheme)
    arrays = grid.arrays(
        grid.round(weight * 1.5, _group(scheme))[0], torch.arange(12.0)
    )  # weights beyond the grid stay in range
    attrs, spec = scheme.attributes(12, 128, True), op_spec(scheme.op)
    back = spec.unpack(spec.pack(arrays, attrs, "test"), attrs)
    for field in ("codes", "scale", "zero", "scale_group", "bias"):
        np.testing.assert_array_equal(getattr(back, field), getattr(arrays, field))


def _error(weight: Tensor, grid: Grid, scheme: QuantScheme, importance: Tensor | None) -> Tensor:
    """sum_k importance (w - w^)^2 of each group, fp64 [N, G]."""
    difference = (grid.round(weight, _group(scheme))[1] - weight).double().square()
    difference = difference if importance is None else difference * importance
    return difference.unflatten(1, (-1, scheme.group_size or weight.shape[1])).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_a_search_never_does_worse_than_min_max(scheme: QuantScheme, weighted: bool) -> None:
    weight = _weight(scheme)
    importance = (
        torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    )
    found, plain = (
        _error(weight, search_grid(weight, scheme, importance, steps), scheme, importance)
        for steps in (40, 1)
    )
    slack = (
        1.05 if scheme.op == "QQQGemm" and scheme.group_size else 1 + 1e-6
    )  # the second level is rounded to int8 after the search
    assert (found <= plain * slack).all()
    assert (
        found.sum() < 0.99 * plain.sum() or scheme.wbits == 8
    )  # where min/max is all there is to find


def test_importance_decides_what_is_kept() -> None:
    weight = _weight(QQQ)[:1]
    weight[0, 3] = 3 * weight.abs().max()
    error = {}
    for name, factor in (("outlier", 1e4), ("rest", 1e-4)):
        importance = torch.ones(128)
        importance[3] = factor
        error[name] = (search_grid(weight, QQQ, importance).round(weight, _group(QQQ))[1] - weight)[
            0, 3
        ].abs() / weight[0, 3].abs()
    assert error["outlier"] < 0.01 and error["rest"] > 0.2


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_an_importance_that_says_nothing_gives_min_max(scheme: QuantScheme, value: float) -> None:
    weight = _weight(scheme)
    found, plain = (
        search_grid(weight, scheme, torch.full((128,), value)),
        search_grid(weight, scheme, steps=1),
    )
    assert all(
        torch.equal(getattr(found, name), array)
        for name, array in vars(plain).items()
        if isinstance(array, Tensor)
    )


@pytest.mark.parametrize("scheme", [QQQ, QQQ_GROUPS], ids=["channel", "groups"])
def test_min_max_clips_nothing(scheme: QuantScheme) -> None:
    """The published code clips +absmax to 0.933 of it, and to 0.47 in a group without negative
    weights.
    """
    weight = _weight(scheme)
    grid = search_grid(weight, scheme, steps=1)
    assert isinstance(grid, QqqGrid)
    values = grid.round(weight, _group(scheme))[1]
    step = (
        grid.channel.abs()
        if grid.group is None
        else (grid.channel * (grid.group[:, _group(scheme)].abs() + 1)).abs()
    )
    assert (
        (values - weight).abs() <= step / 2 * (1 + 1e-3)
    ).all()  # half a step, and half an int8 step with groups
    ends = weight.abs().amax(1)
    assert (
        (values.abs().amax(1) - ends).abs() <= ends * (1e-6 if grid.group is None else 1 / 127)
    ).all()


@pytest.mark.parametrize("scheme", [QQQ, QQQ_GROUPS], ids=["channel", "groups"])
def test_the_odd_level_goes_to_the_wider_side(scheme: QuantScheme) -> None:
    """A scale's sign turns codes -8..7 into levels 8..-7; every group of these rows has its
    farthest weight on one side.
    """
    weight = _weight(scheme)[:2].abs()
    weight[:, ::2] *= -0.9
    for side in (1, -1):
        grid = search_grid(side * weight, scheme)
        assert isinstance(grid, QqqGrid)
        signed = grid.channel if grid.group is None else grid.group
        wider = (side * weight).unflatten(1, (signed.shape[1], -1))
        assert torch.equal(signed < 0, wider.amax(-1) > -wider.amin(-1))
        assert (grid.group is None) or (grid.channel > 0).all()


def _hessian(columns: int = 128) -> Tensor:
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 1:] += 0.7 * x[:, :-1]
    return x.T @ x


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.op}-{scheme.label}")
def test_refitted_scales_suit_the_codes_better_and_are_still_the_ops(scheme: QuantScheme) -> None:
    weight, group, hessian = _weight(scheme), _group(scheme), _hessian()
    grid = search_grid(weight, scheme, steps=1)
    codes, values = grid.round(weight, group)
    refitted = grid.refitted(weight, codes, hessian)
    fitted = refitted.values(codes, group)
    assert torch.equal(fitted, _dequantized(refitted.arrays(codes, None), scheme))
    assert quadratic_error(weight, fitted, hessian) < quadratic_error(weight, values, hessian)
    old, new = (one.scale if isinstance(one, AbqGrid) else one.channel for one in (grid, refitted))
    assert ((new / old > 0.5) & (new / old < 2)).all() and torch.equal(
        new[3], old[3]
    )  # of a row of zeros there is nothing to fit


@pytest.mark.parametrize(
    "hessian", [torch.zeros(128, 128), torch.full((128, 128), torch.nan)], ids=["zero", "nan"]
)
@pytest.mark.parametrize(
    "scheme", [QQQ, QQQ_GROUPS, ABQ[4], ABQ[5]], ids=lambda scheme: f"{scheme.op}-{scheme.label}"
)
def test_a_hessian_that_says_nothing_fits_nothing(scheme: QuantScheme, hessian: Tensor) -> None:
    weight, group = _weight(scheme), _group(scheme)
    grid = search_grid(weight, scheme, steps=1)
    refitted = grid.refitted(weight, grid.round(weight, group)[0], hessian)
    assert all(
        torch.equal(getattr(refitted, name), array)
        for name, array in vars(grid).items()
        if isinstance(array, Tensor)
    )


def test_chunks_of_rows_do_not_change_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(QQQ)
    for scheme in (QQQ, QQQ_GROUPS, ABQ[5]):
        whole = search_grid(weight, scheme)
        with monkeypatch.context() as patch:
            patch.setattr("calibration.solvers.grid._CHUNK", 128 * 5)
            parts = search_grid(weight, scheme)
        assert all(
            torch.equal(getattr(parts, name), array)
            for name, array in vars(whole).items()
            if isinstance(array, Tensor)
        )
