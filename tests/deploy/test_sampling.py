"""Choosing tokens: greedy, temperature, top-k, seeds, and NaN."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.sampling import Sampler, Sampling
from plugins.errors import CheckError, InputError

LOGITS = np.log(np.array([0.1, 0.6, 0.05, 0.25], np.float32))


def draws(sampling: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=4) / count


def test_greedy_takes_the_best() -> None:
    assert draws(Sampling(), 5).tolist() == [0, 1, 0, 0]


def test_temperature_one_draws_from_the_models_distribution() -> None:
    np.testing.assert_allclose(draws(Sampling(1.0)), [0.1, 0.6, 0.05, 0.25], atol=0.03)


def test_temperature_squeezes_the_odds() -> None:
    squared = np.array([0.1, 0.6, 0.05, 0.25]) ** 2  # temperature 1/2
    np.testing.assert_allclose(draws(Sampling(0.5)), squared / squared.sum(), atol=0.03)


def test_top_k_draws_among_the_best() -> None:
    np.testing.assert_allclose(
        draws(Sampling(1.0, top_k=2)), [0, 0.6 / 0.85, 0, 0.25 / 0.85], atol=0.03
    )
    assert draws(Sampling(1.0, top_k=1), 5)[1] == 1
    assert draws(Sampling(1.0, top_k=99)).min() > 0


def test_the_same_seed_draws_the_same() -> None:
    first, same, other = (Sampler(Sampling(1.0, seed=seed)) for seed in (7, 7, 8))
    rows = [[sampler.choose(LOGITS) for _ in range(50)] for sampler in (first, same, other)]
    assert rows[0] == rows[1] != rows[2]


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert Sampler(Sampling(1e-6)).choose(np.array([-60000, 60000, 59000], np.float32)) == 1


def test_minus_infinity_is_never_drawn() -> None:
    sampler = Sampler(Sampling(1.0))
    assert {sampler.choose(np.array([0, -np.inf, 0], np.float32)) for _ in range(50)} == {0, 2}


def test_top_k_without_temperature_is_refused() -> None:
    with pytest.raises(InputError) as error:
        Sampling(top_k=40)
    assert str(error.value) == (
        "--top-k: got 40 with temperature 0, expected none: 0 always takes the best token. "
        "Add --temperature 0.8, or leave --top-k out."
    )


def test_nan_is_an_error() -> None:
    with pytest.raises(CheckError) as error:
        Sampler(Sampling()).choose(np.array([0, np.nan, 1], np.float32))
    assert str(error.value) == (
        "logits: got 1 NaN of 3, expected finite numbers. An activation overflowed: look at the "
        "report's first "
        "bad layer, or export with --dtype bfloat16."
    )
