"""The loss terms against their formulas, on the rows that attention really has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calibration.families.steps import Attend
from calibration.methods.abq.losses import (
    LossWeights,
    attention_divergence,
    block_loss,
    direction_loss,
    output_error,
    sample_rows,
)
from calibration.reference.steps import attention_rows


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_error_has_no_unit() -> None:
    target, noise = gaussian(1, 16, 8), gaussian(1, 16, 8, seed=1)
    expected = (noise.square().mean() / target.square().mean()) * 0.01
    torch.testing.assert_close(output_error(target + 0.1 * noise, target), expected)
    torch.testing.assert_close(output_error(1e3 * (target + 0.1 * noise), 1e3 * target), expected)
    assert float(output_error(target, torch.zeros_like(target))) > 0  # finite


def test_direction_is_the_mean_cosine_before_the_logarithm() -> None:
    y = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]]])
    target = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]])
    expected = -math.log((1 + math.sqrt(0.5) + 0) / 3)
    assert float(direction_loss(y, target)) == pytest.approx(expected, rel=1e-6)
    assert float(direction_loss(5 * target, target)) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(float(direction_loss(y[:, 2:], target[:, 2:])))  # orthogonal


ATTEND = Attend(scale=0.5)  # heads of 4


def softmax_rows(seed: int, heads: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, heads, length, 4]."""
    return gaussian(1, heads, length, 4, seed=seed), gaussian(1, heads, length, 4, seed=seed + 10)


def test_attention_divergence_is_the_symmetric_one_of_true_causal_rows() -> None:
    rows = torch.tensor([0, 5, 11])
    logs = [attention_rows(*softmax_rows(seed), rows, ATTEND) for seed in (0, 1)]
    expected = []
    for head in range(2):
        for place, row in enumerate(rows.tolist()):
            p, t = (log[0, head, place, : row + 1].double().exp() for log in logs)
            expected.append(float((p * (p / t).log()).sum() + (t * (t / p).log()).sum()))
    assert float(attention_divergence(*logs)) == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert float(attention_divergence(logs[0], logs[0])) == 0


def test_attention_divergence_does_not_fade_with_length() -> None:
    """Trap 2: a second softmax and a mean over all L^2 entries make the published term vanish."""
    sharp = []
    for length in (16, 256):
        query, key = softmax_rows(3, length=length)
        rows = torch.arange(length // 2, length)
        log_p, log_t = (
            attention_rows(4 * query, key, rows, ATTEND),
            attention_rows(4 * query.flip(-1), key, rows, ATTEND),
        )
        sharp.append(float(attention_divergence(log_p, log_t)))
        p, t = log_p.exp().log_softmax(-1), log_t.exp().log_softmax(-1)
        published = float(((p.exp() - t.exp()) * (p - t)).mean())
        assert published < 0.01 * sharp[-1]
    assert sharp[1] > 0.5 * sharp[0] > 0.5


def test_attention_gradient_is_finite_behind_the_mask() -> None:
    query, key = softmax_rows(0)
    query.requires_grad_()
    key.requires_grad_()
    rows = torch.tensor([0, 3])
    attention_divergence(
        attention_rows(query, key, rows, ATTEND), attention_rows(*softmax_rows(1), rows, ATTEND)
    ).backward()
    assert query.grad is not None and key.grad is not None
    assert torch.isfinite(query.grad).all() and torch.isfinite(key.grad).all()
    assert (
        query.grad[:, :, 3].abs().min() > 0
        and query.grad[:, :, 4:].eq(0).all()
        and key.grad[:, :, 4:].eq(0).all()
    )


def test_block_loss_is_the_weighted_sum_over_targets() -> None:
    y, targets = gaussian(1, 6, 8), [gaussian(1, 6, 8, seed=seed) for seed in (1, 2)]
    rows = tuple(
        attention_rows(*softmax_rows(seed), torch.tensor([4, 9]), ATTEND) for seed in (0, 1)
    )
    error, direction = (
        sum(float(term(y, target)) for target in targets) for term in (output_error, direction_loss)
    )
    attention = float(attention_divergence(*rows))
    for weights in (
        LossWeights(),
        LossWeights(2, 0, 0),
        LossWeights(0, 3, 0),
        LossWeights(0.5, 1, 7),
    ):
        expected = (
            weights.error * error + weights.direction * direction + weights.attention * attention
        )
        assert float(block_loss(y, targets, rows, weights)) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]
    assert float(block_loss(y, targets[:1], None, LossWeights(1, 0, 5))) == pytest.approx(
        float(output_error(y, targets[0]))
    )


def test_sampled_rows_cover_the_window_and_move_between_windows() -> None:
    rows = [sample_rows(512, 64, window) for window in range(8)]
    assert all(
        len(row) == 64 and row.min() >= 0 and row.max() < 512 and (row.diff() == 8).all()
        for row in rows
    )
    assert len({int(row[0]) for row in rows}) >= 6
    assert torch.equal(sample_rows(512, 64, 3), rows[3])
    assert sample_rows(10, 64, 5).tolist() == list(range(10))
    assert len(sample_rows(100, 64, 1).unique()) == 64
