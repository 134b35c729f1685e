"""Errors of tensors: every token counts alike, padding does not count, NaN is loud, calls add up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exporter.proof.metrics import EXACT_DB, CompareTensors, tensor_error

ALL = np.ones((1, 4), bool)


def some(seed: int = 0, shape: tuple[int, ...] = (1, 4, 8)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_equal_tensors_have_no_error() -> None:
    error = tensor_error(some(), some(), ALL)
    assert (error.relative, error.snr_db, error.max_abs, error.agreement) == (
        0.0,
        EXACT_DB,
        0.0,
        1.0,
    )
    assert error.cosine == pytest.approx(1.0) and error.cosine <= 1.0
    assert error.worst_channel[1] == 0.0 and error


def test_known_values() -> None:
    reference = np.array([[[3.0, 4.0], [0.0, 2.0]]])
    got = np.array([[[3.0, 4.5], [0.2, 2.0]]])
    error = tensor_error(reference, got, np.ones((1, 2), bool))
    assert error.relative == pytest.approx(math.sqrt((0.25 / 25 + 0.04 / 4) / 2))
    assert error.snr_db == pytest.approx(-20 * math.log10(error.relative))
    assert error.max_abs == pytest.approx(0.5)
    assert error.worst_channel == (1, pytest.approx(0.5 / math.sqrt(20)))


def test_a_loud_token_does_not_hide_a_wrong_one() -> None:
    reference = some()
    reference[0, 0] *= 1e4
    got = reference.copy()
    got[0, 3] = -got[0, 3]
    error = tensor_error(reference, got, ALL)
    assert error.relative == pytest.approx(1.0) and error.cosine == pytest.approx(0.5)


def test_one_wrong_channel_stands_out() -> None:
    reference = some(shape=(1, 64, 512))
    got = reference * (1 + 1e-4)
    got[..., 77] *= 1.5
    error = tensor_error(reference, got, np.ones((1, 64), bool))
    assert error.worst_channel == (77, pytest.approx(0.5, rel=1e-3)) and error.relative < 0.03


def test_padding_is_left_out() -> None:
    got = some()
    got[0, :2] = np.nan
    error = tensor_error(some(), got, np.array([[False, False, True, True]]))
    assert error.tokens == 2 and error.relative == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    got = some()
    got[0, 1, 1] = value
    error = tensor_error(some(), got, ALL)
    assert (
        not error
        and error.relative == math.inf
        and math.isnan(error.cosine)
        and error.snr_db == -math.inf
    )
    assert not tensor_error(some(), some(), ALL) + error


def test_calls_add_up() -> None:
    reference, got = some(1), some(2)
    whole = tensor_error(reference, got, ALL)
    parts = tensor_error(reference[:, :1], got[:, :1], ALL[:, :1]) + tensor_error(
        reference[:, 1:], got[:, 1:], ALL[:, 1:]
    )
    for name in ("tokens", "relative", "cosine", "max_abs", "agreement"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))
    np.testing.assert_allclose(parts.channel_error, whole.channel_error)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"^shapes differ: \(1, 4, 8\), \(1, 4, 7\), \(1, 4\)$"):
        tensor_error(some(), some(shape=(1, 4, 7)), ALL)


def test_compare_takes_common_tensors_and_new_cache_tokens() -> None:
    cache = some(3, (1, 2, 6, 5))  # two old tokens, four new ones
    other = cache.copy()
    other[:, :, :2] += 1
    found = CompareTensors(ALL)(
        {"a": some(), "present.0.key": cache, "b": some()}, {"present.0.key": other, "a": some(1)}
    )
    assert list(found) == ["a", "present.0.key"]
    assert found["present.0.key"].relative == 0.0 and found[
        "present.0.key"
    ].channel_error.shape == (10,)
    assert found["a"].relative > 0.5


def test_an_expert_with_other_rows_differs_wholly() -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.output"
    rows, fewer, none = some(shape=(1, 4, 8)), some(shape=(1, 3, 8)), some(shape=(1, 0, 8))
    compare = CompareTensors(ALL)
    assert compare({name: none}, {name: none}) == {}
    assert compare({name: rows}, {name: rows})[name].relative == 0
    for pair in ((rows, none), (none, rows), (rows, fewer)):
        error = compare({name: pair[0]}, {name: pair[1]})[name]
        assert error.relative == error.worst_channel[1] == math.inf and error.peak == 0
        total = error + compare({name: rows}, {name: rows})[name]
        assert total.relative == math.inf
