"""Tokens chosen in C++ against numpy, by the same rules and the same random numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB, ROWS = 300, 40
MASK = (1 << 64) - 1


def uniform(seed: int, n: int) -> float:
    """SplitMix64 as its authors give it (Steele, Lea, Flood 2014), in Python's whole numbers."""
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return ((z ^ z >> 31) >> 11) * 2.0**-53


class Reference:
    """What anybit/sampling.hpp says."""

    def __init__(self, prompt: list[int], **options: Any) -> None:
        self.options, self.seen, self.made, self.drawn = options, set(prompt), [], 0

    def choose(self, logits: np.ndarray) -> tuple[int, float, list[tuple[int, float]]]:
        get = self.options.get
        scores = logits.astype(np.float64)
        for token, bias in get("logit_bias", []):
            scores[token] += bias
        penalty = np.float64(np.float32(get("repetition_penalty", 1)))
        for token in self.seen:
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        for token in set(self.made):
            times = self.made.count(token)
            scores[token] -= np.float32(get("presence_penalty", 0))
            scores[token] -= np.float64(np.float32(get("frequency_penalty", 0))) * times
        order = np.lexsort((np.arange(len(scores)), -scores))
        token = int(order[0])
        if temperature := get("temperature", 0):
            odds = np.exp((scores[order] - scores[order[0]]) / np.float32(temperature))
            candidates = get("top_k", 0) or len(scores)
            odds = odds[:candidates]
            before = np.cumsum(odds) - odds
            odds = odds[before < np.float32(get("top_p", 1)) * odds.sum()]
            odds = odds[odds >= np.float32(get("min_p", 0))]
            drawn = uniform(get("seed", 0), self.drawn)
            self.drawn += 1
            token = int(order[np.searchsorted(np.cumsum(odds) / odds.sum(), drawn, side="right")])
        self.seen.add(token)
        self.made.append(token)
        log_odds = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        best = order[: max(get("logprobs", -1), 0)]
        return token, log_odds[token], [(int(i), log_odds[i]) for i in best]


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "seed": 3},
    "hot": {"temperature": 9.0, "seed": (1 << 64) - 1},
    "cold": {"temperature": 0.01, "seed": 4},
    "top k": {"temperature": 1.3, "top_k": 5, "seed": 5},
    "more than there are": {"temperature": 1.3, "top_k": 1000, "seed": 5},
    "top p": {"temperature": 2.0, "top_p": 0.5, "seed": 6},
    "tiny top p": {"temperature": 2.0, "top_p": 1e-9, "seed": 6},
    "min p": {"temperature": 2.0, "min_p": 0.2, "seed": 7},
    "all limits": {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 8},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "bias": {"logit_bias": [[7, 20.0], [8, -100.0], [8, 2.0]]},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "logit_bias": [[3, 4.0]],
        "seed": 11,
    },
}


LARGE = {  # of which more and more of the best are looked for
    "large, hot": {"temperature": 9.0, "seed": 12},
    "large, top p": {"temperature": 3.0, "top_p": 0.7, "seed": 13},
    "large, min p": {"temperature": 4.0, "min_p": 0.01, "seed": 14},
    "large, top k": {"temperature": 4.0, "top_k": 900, "seed": 15},
    "large, greedy": {"repetition_penalty": 1.8},
}


@pytest.mark.parametrize(
    ("options", "rows", "vocab"),
    [
        *((options, ROWS, VOCAB) for options in CASES.values()),
        *((options, 12, 4001) for options in LARGE.values()),
    ],
    ids=[*CASES, *LARGE],
)
def test_tokens_are_those_of_numpy(
    compiled: Callable[..., Path], options: dict[str, Any], rows: int, vocab: int
) -> None:
    random = np.random.default_rng(1)
    logits = (random.standard_normal((rows, vocab)) * 3).round(1).astype(np.float32)  # with equals
    prompt = random.integers(0, vocab, 20).tolist()
    options = {**options, "logprobs": 4}
    task = {"prompt": prompt, "sampling": options, "logits": logits.tolist()}
    result = subprocess.run(
        [compiled("driver")], input=json.dumps(task), capture_output=True, text=True, check=True
    )
    reference = Reference(prompt, **options)
    for row, got in zip(logits, json.loads(result.stdout), strict=True):
        token, log_odds, best = reference.choose(row)
        assert got["id"] == token
        assert got["logprob"] == pytest.approx(log_odds, abs=1e-4)
        assert [i for i, _ in got["top"]] == [i for i, _ in best]
        assert [p for _, p in got["top"]] == pytest.approx([p for _, p in best], abs=1e-4)
    # What is reported changes nothing.
    silent = subprocess.run(
        [compiled("driver")],
        input=json.dumps({**task, "sampling": {**options, "logprobs": -1}}),
        capture_output=True,
        text=True,
        check=True,
    )
    chosen = [choice["id"] for choice in json.loads(silent.stdout)]
    assert chosen == reference.made
