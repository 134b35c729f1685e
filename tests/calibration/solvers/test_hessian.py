"""Moments: sums that no order of windows changes, and the weight that makes up for what earlier
layers got wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.solvers.hessian import Moments, corrected_target


def _windows(count: int = 6, length: int = 40, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(what the kernel sees, what the float model has), correlated and different."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator)
    real = [torch.randn(length, size, generator=generator) @ mix for _ in range(count)]
    return [(0.9 * x + 0.3 * torch.randn(length, size, generator=generator), x) for x in real]


def _moments(windows: list[tuple[Tensor, Tensor]], cross: bool = True) -> Moments:
    moments = Moments(windows[0][0].shape[1], cross)
    for seen, wanted in windows:
        moments.add(seen, wanted if cross else None)
    return moments


def test_sums_are_those_of_all_tokens() -> None:
    windows = _windows()
    seen, wanted = (torch.cat([pair[which] for pair in windows]).double() for which in (0, 1))
    moments = _moments(windows)
    assert moments.cross is not None
    torch.testing.assert_close(moments.hessian, seen.T @ seen, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments.cross, (wanted - seen).T @ seen, rtol=1e-5, atol=1e-3)
    assert _moments(windows, cross=False).cross is None


def test_order_of_the_windows_and_shares_of_processes_do_not_count() -> None:
    windows = _windows()
    whole, backwards = _moments(windows).hessian, _moments(windows[::-1]).hessian
    parts = sum(_moments(windows[rank::3]).hessian for rank in range(3))
    for other in (backwards, parts):
        assert (other - whole).abs().max() <= 1e-14 * whole.abs().max()


def test_the_corrected_weight_comes_nearest_to_the_float_product() -> None:
    windows, weight = _windows(), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    seen, wanted = (torch.cat([pair[which] for pair in windows]) for which in (0, 1))
    moments = _moments(windows)

    def distance(candidate: Tensor) -> float:
        return float((seen @ candidate.T - wanted @ weight.T).square().sum())

    best = torch.linalg.lstsq(seen.double(), wanted.double() @ weight.double().T).solution.T.float()
    full, half = corrected_target(weight, moments), corrected_target(weight, moments, 0.5)
    assert distance(best) <= distance(full) < distance(half) < distance(weight)
    assert distance(weight) - distance(full) > 0.8 * (
        distance(weight) - distance(best)
    )  # damping keeps it from all of it
    torch.testing.assert_close(half, (weight + full) / 2)


def test_without_a_cross_moment_or_a_share_the_weight_stays() -> None:
    weight = torch.randn(5, 16)
    assert corrected_target(weight, _moments(_windows(), cross=False)) is weight
    assert corrected_target(weight, _moments(_windows()), 0.0) is weight


@pytest.mark.parametrize("bad", ["hessian", "cross"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_correct_nothing(bad: str, value: float) -> None:
    moments, weight = _moments(_windows()), torch.randn(5, 16)
    getattr(moments, bad)[3, 3] = value
    assert torch.equal(corrected_target(weight, moments), weight)


def test_dead_channels_and_few_tokens_correct_without_blowing_up() -> None:
    windows = [
        (seen[:2].clone(), wanted[:2].clone()) for seen, wanted in _windows(2)
    ]  # 4 tokens for 16 channels
    for pair in windows:
        for x in pair:
            x[:, 7] = 0
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    corrected = corrected_target(weight, _moments(windows))
    assert torch.isfinite(corrected).all() and torch.equal(corrected[:, 7], weight[:, 7])
    assert (corrected - weight).norm() < 2 * weight.norm()
    silent = Moments(16, True)
    silent.add(torch.zeros(3, 16), torch.zeros(3, 16))
    assert torch.equal(corrected_target(weight, silent), weight)
