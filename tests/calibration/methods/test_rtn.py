"""Round to nearest: error bounds, exact hits, and rows that break naive formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.methods import find_method, method_names
from calibration.methods.rtn import quantize
from calibration.quant.scheme import QuantLinear, QuantScheme
from plugins.errors import InputError

RNG = np.random.default_rng(1)


def _abq(wbits: int, group_size: int = 0, balanced: bool = False) -> QuantScheme:
    return QuantScheme("ABQGemm", "rtn", wbits, 8, balanced, group_size)


def _qqq(group_size: int = 0) -> QuantScheme:
    return QuantScheme("QQQGemm", "rtn", 4, 8, False, group_size, True)


def _dequantized(weight: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    return QuantLinear("test", scheme, quantize(weight, None, scheme)).dequantize()


def test_registry() -> None:
    assert set(method_names()) >= {"abq", "qqq", "rtn"}
    assert find_method("rtn").quantize is quantize
    assert [name for name in method_names() if not find_method(name).looks_at_data] == ["rtn"]
    with pytest.raises(InputError) as caught:
        find_method("magic")
    assert str(caught.value) == (
        f"method 'magic': unknown, expected one of {', '.join(method_names())}, or the path of a "
        f".py file. Check the spelling."
    )


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("wbits", [2, 3, 4, 5, 6, 7, 8])
def test_abq_error_is_at_most_one_step(wbits: int, group_size: int) -> None:
    weight = RNG.standard_normal((7, 48)).astype(np.float32) + np.float32(0.3)
    scheme = _abq(wbits, group_size)
    arrays = quantize(weight, None, scheme)
    error = np.abs(_dequantized(weight, scheme) - weight).reshape(7, -1, group_size or 48).max(-1)
    # half a step for the code, and half a step at the ends because the zero point is an integer
    assert (error <= arrays.scale * 1.0001).all()
    assert arrays.codes.dtype == np.uint8 and arrays.codes.max() <= 2**wbits - 1
    groups = weight.reshape(7, -1, group_size or 48)
    np.testing.assert_allclose(
        arrays.scale, (groups.max(-1) - groups.min(-1)) / (2**wbits - 1), rtol=1e-6
    )


def test_abq_weights_on_the_grid_come_back_exactly() -> None:
    codes = RNG.integers(0, 16, (5, 32))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = ((codes - 6) * 0.25).astype(np.float32)
    arrays = quantize(weight, None, _abq(4))
    np.testing.assert_array_equal(arrays.codes, codes)
    np.testing.assert_array_equal(arrays.zero, np.full((5, 1), 6))
    np.testing.assert_array_equal(_dequantized(weight, _abq(4)), weight)


def test_abq_zero_point_leaves_the_code_range_for_rows_of_one_sign() -> None:
    weight = np.stack([np.linspace(10, 11, 32), np.linspace(-11, -10, 32)]).astype(np.float32)
    arrays = quantize(weight, None, _abq(4))
    assert arrays.zero is not None and arrays.zero[0, 0] == -150 and arrays.zero[1, 0] == 165
    assert np.abs(_dequantized(weight, _abq(4)) - weight).max() <= arrays.scale.max()


@pytest.mark.parametrize(
    "scheme",
    [
        _abq(1),
        _abq(1, balanced=True),
        _abq(2),
        _abq(2, balanced=True),
        _abq(4),
        _abq(8),
        _abq(4, 64),
        _qqq(),
        _qqq(64),
        replace(_abq(4, 64), has_minimum=True),
    ],
    ids=str,
)
def test_hard_rows_give_finite_positive_scales(scheme: QuantScheme) -> None:
    width = 128
    weight = np.zeros((8, width), np.float32)
    weight[1] = 3.5  # constant
    weight[2] = -1e-30
    weight[3, 5] = 1e-42  # subnormal
    weight[4] = RNG.standard_normal(width) * 1e30
    weight[5, ::2] = 3e38
    weight[5, 1::2] = -3e38
    weight[6, 7] = -2.0  # one weight
    weight[7] = np.linspace(1, 1 + 1e-6, width)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        arrays = quantize(weight, None, scheme)
    assert np.isfinite(arrays.scale).all() and (arrays.scale >= 2.0**-126).all()
    if arrays.scale_group is not None:
        assert np.isfinite(arrays.scale_group).all() and (arrays.scale_group >= 0).all()
    if arrays.zero is not None:
        assert np.abs(arrays.zero).max() <= 2**15 + 2**8
    with np.errstate(over="ignore"):  # row 5 spans more than fp32
        values = _dequantized(weight, scheme)
    assert np.isfinite(values[[0, 1, 2, 3, 4, 6, 7]]).all()
    np.testing.assert_array_equal(values[0], 0)
    if scheme.levels > 3:
        np.testing.assert_allclose(values[1], 3.5, rtol=1e-2)
        np.testing.assert_allclose(values[6, 7], -2.0, rtol=1e-2)


def test_two_levels_lie_on_the_side_with_more_energy() -> None:
    weight = np.array([[-4.0, 1, 1, 1] * 8, [4.0, -1, -1, -1] * 8], np.float32)
    arrays = quantize(weight, None, _abq(1))
    assert arrays.zero is not None and arrays.zero.ravel().tolist() == [1, 0]
    values = _dequantized(weight, _abq(1))
    assert set(np.unique(values[0])) == {np.float32(-1.75 * 1.5), np.float32(0)}
    assert np.square(values - weight).sum() < np.square(weight).sum()


@pytest.mark.parametrize(("wbits", "levels"), [(1, 3), (2, 5)])
def test_balanced_sets_use_every_level_and_beat_the_plain_ones(wbits: int, levels: int) -> None:
    weight = RNG.standard_normal((16, 256)).astype(np.float32)
    balanced = _abq(wbits, balanced=True)
    arrays = quantize(weight, None, balanced)
    assert set(np.unique(arrays.codes)) == set(range(levels))
    error = np.square(_dequantized(weight, balanced) - weight).mean()
    assert error < np.square(_dequantized(weight, _abq(wbits)) - weight).mean()


def test_one_bit_ternary_is_near_the_best_for_gaussian_weights() -> None:
    weight = RNG.standard_normal((8, 4096)).astype(np.float32)
    error = np.square(_dequantized(weight, _abq(1, balanced=True)) - weight).mean()
    assert error == pytest.approx(0.190, abs=0.01)  # Max 1960: three levels, unit variance


def test_qqq_per_channel_keeps_both_ends() -> None:
    weight = RNG.uniform(-1, 1, (4, 32)).astype(np.float32)
    weight[:, 0] = [2.0, -2.0, 2.0, -2.0]
    arrays = quantize(weight, None, _qqq())
    assert arrays.codes.dtype == np.int8 and arrays.codes.min() >= -7 and arrays.codes.max() <= 7
    np.testing.assert_allclose(_dequantized(weight, _qqq())[:, 0], weight[:, 0], rtol=1e-6)


def test_qqq_per_group_does_not_clip_the_positive_maximum() -> None:
    """Trap 21: a scale of 2*absmax/15 with codes -8..7 clips +absmax to 0.933 of it, and a group
    without negatives to 0.47.
    """
    weight = RNG.uniform(0.1, 1, (6, 128)).astype(np.float32)
    weight[:, 3], weight[:, 70] = 4.0, 4.0
    values = _dequantized(weight, _qqq(64))
    np.testing.assert_allclose(values[:, [3, 70]], 4.0, rtol=0.01)


def test_qqq_per_group_second_level_covers_int8_and_its_rounding_is_small() -> None:
    """Trap 20: the int8 re-rounding belongs to the numbers; it costs at most half an int8 step of
    the row.
    """
    weight = RNG.standard_normal((8, 256)).astype(np.float32)
    arrays = quantize(weight, None, _qqq(64))
    assert arrays.scale_group is not None
    int8 = np.rint(
        arrays.codes.astype(np.float32).reshape(8, 4, 64)
        * arrays.scale_group.astype(np.float32)[..., None]
    )
    np.testing.assert_array_equal(np.abs(int8).max((1, 2)), np.full(8, 127))
    group_scale = np.abs(weight.reshape(8, 4, 64)).max(-1) / 7
    first_level = (arrays.codes.reshape(8, 4, 64) * group_scale[..., None]).reshape(8, 256)
    assert (np.abs(_dequantized(weight, _qqq(64)) - first_level) <= arrays.scale * 0.7).all()


@pytest.mark.parametrize("scheme", [_abq(3, 32), _qqq(64)], ids=str)
def test_chunks_of_rows_do_not_change_the_result(
    scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = (
        RNG.standard_normal((9, 128)).astype(np.float16),
        RNG.standard_normal(9).astype(np.float16),
    )
    whole = quantize(weight, bias, scheme)
    monkeypatch.setattr("calibration.methods.rtn._CHUNK", 300)
    parts = quantize(weight, bias, scheme)
    for field in ("codes", "scale", "zero", "scale_group", "bias"):
        first, second = getattr(whole, field), getattr(parts, field)
        assert (first is None) == (second is None)
        if first is not None:
            np.testing.assert_array_equal(first, second)
            assert first.dtype == second.dtype
    assert whole.bias is not None and whole.bias.dtype == np.float32
