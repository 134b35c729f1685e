"""Choosing tokens: greedy, temperature, top-k, top-p, penalties, seeds; and who says so."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibration.out.description import SamplingDefaults
from deploy.sampling import Sampler, Sampling, SamplingOptions
from plugins.errors import InputError

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


@pytest.mark.parametrize("temperature", [5e-324, 1e-6, 100.0])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_no_bounds_are_near_those_of_numbers(temperature: float, penalty: float) -> None:
    sampler = Sampler(Sampling(temperature, repetition_penalty=penalty))
    logits = np.array([-3e38, 3e38, 2e38, 0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler.choose(logits) == 1 and sampler.choose(logits, [0, 3]) == 1


def test_minus_infinity_is_never_drawn() -> None:
    sampler = Sampler(Sampling(1.0))
    assert {sampler.choose(np.array([0, -np.inf, 0], np.float32)) for _ in range(50)} == {0, 2}


# ---------------------------------------------------------------- as transformers' generate


def _transformers(sampling: Sampling, logits: np.ndarray, text: list[int]) -> np.ndarray:
    """The odds of every token, by transformers' own processors in the order of its generate."""
    import torch
    from transformers import generation

    scores, tokens = torch.from_numpy(logits)[None], torch.tensor([text])
    makers = [
        (sampling.repetition_penalty != 1, generation.RepetitionPenaltyLogitsProcessor),
        (sampling.temperature != 1, generation.TemperatureLogitsWarper),
        (sampling.top_k != 0, generation.TopKLogitsWarper),
        (sampling.top_p != 1, generation.TopPLogitsWarper),
    ]
    numbers = (
        sampling.repetition_penalty,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
    )
    for (wanted, maker), number in zip(makers, numbers, strict=True):
        if wanted:
            scores = maker(number)(tokens, scores)
    return np.asarray(scores.double().softmax(-1)[0])


def _ours(sampling: Sampling, logits: np.ndarray, text: list[int]) -> np.ndarray:
    sampler, odds = Sampler(sampling), np.zeros(len(logits))
    tokens, likely = sampler.odds(sampler.penalized(logits, text))
    odds[tokens] = likely
    return odds


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_the_odds_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    random = np.random.default_rng(0)
    sampling = Sampling(temperature, top_k, top_p=top_p, repetition_penalty=penalty)
    for _ in range(5):
        logits = random.normal(size=60).astype(np.float32) * 4
        text = random.integers(0, 60, 40).tolist()
        np.testing.assert_allclose(
            _ours(sampling, logits, text), _transformers(sampling, logits, text), atol=1e-6
        )


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_a_penalty_changes_the_best_token_as_in_transformers(penalty: float) -> None:
    import torch
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    random, changed = np.random.default_rng(1), 0
    for _ in range(50):
        logits = random.normal(size=30).astype(np.float32)
        text = random.integers(0, 30, 20).tolist()
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        scores = processor(torch.tensor([text]), torch.from_numpy(logits.copy())[None])
        before = logits.copy()
        best = Sampler(Sampling(repetition_penalty=penalty)).choose(logits, text)
        assert best == int(scores.argmax()) and (logits == before).all()
        changed += best != int(logits.argmax())
    assert changed > 5


DRAWN = SamplingDefaults(
    do_sample=True, temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.1
)


@pytest.mark.parametrize(
    ("given", "model", "found"),
    [
        ({}, SamplingDefaults(), Sampling()),
        ({}, DRAWN, Sampling(0.6, 50, top_p=0.9, repetition_penalty=1.1)),
        ({"seed": 3}, DRAWN, Sampling(0.6, 50, 3, 0.9, 1.1)),
        # greedy unless do_sample says otherwise, however odd a temperature is given
        ({}, replace(DRAWN, do_sample=False), Sampling(repetition_penalty=1.1)),
        ({"temperature": 0.8}, SamplingDefaults(), Sampling(0.8)),
        ({"temperature": 0.8}, replace(DRAWN, do_sample=False), Sampling(0.8, 50, 0, 0.9, 1.1)),
        ({"temperature": 0.0}, DRAWN, Sampling(repetition_penalty=1.1)),
        ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, DRAWN, Sampling(0.6)),
        ({"top_k": 5}, DRAWN, Sampling(0.6, 5, top_p=0.9, repetition_penalty=1.1)),
    ],
)
def test_options_go_over_what_the_model_says(
    given: dict[str, Any], model: SamplingDefaults, found: Sampling
) -> None:
    assert SamplingOptions(**given).over(model) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"top_k": 40},
            "--top-k: got 40 with temperature 0, expected none: 0 always takes the best token. "
            "Add --temperature 0.8, or leave --top-k out.",
        ),
        (
            {"top_p": 0.9},
            "--top-p: got 0.9 with temperature 0, expected none: 0 always takes the best token. "
            "Add --temperature 0.8, or leave --top-p out.",
        ),
        (
            {"top_p": 1.5, "temperature": 1.0},
            "--top-p: got 1.5, expected more than 0 and at most 1. Give such a number; 1 draws "
            "among all tokens.",
        ),
        (
            {"top_p": 0.0, "temperature": 1.0},
            "--top-p: got 0, expected more than 0 and at most 1. Give such a number; 1 draws "
            "among all tokens.",
        ),
        (
            {"repetition_penalty": 0.0},
            "--repetition-penalty: got 0, expected 0.01 to 100. Give such a number; 1 changes "
            "nothing.",
        ),
        (
            {"repetition_penalty": 1e300},
            "--repetition-penalty: got 1e+300, expected 0.01 to 100. Give such a number; 1 changes "
            "nothing.",
        ),
        (
            {"temperature": 101.0},
            "--temperature: got 101, expected 0 to 100. Give such a number; 0 takes the best "
            "token, 1 the model's own odds.",
        ),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingOptions(**given).over(SamplingDefaults())
    assert str(error.value) == message
