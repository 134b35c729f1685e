"""ABQGemm: packed bytes against the written-out layout, exact arithmetic, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plugins import op_spec
from plugins.core.activation import quantize_activation
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError
from tests.plugins.kernel_cases import BF16, F16, F32, LEVELS, abq, abq_arrays, tokens

SPEC = op_spec("ABQGemm")


def planes_by_loops(codes: np.ndarray, attrs: GemmAttributes) -> np.ndarray:
    """The layout formula, bit by bit."""
    group_words = (attrs.group_len + 31) // 32
    row_words = (attrs.n_groups * group_words + 3) // 4 * 4
    words = np.zeros((attrs.planes, attrs.out_features, row_words), np.uint32)
    for n in range(attrs.out_features):
        for k in range(attrs.in_features):
            g, e = divmod(k, attrs.group_len)
            for j in range(attrs.planes):
                words[j, n, g * group_words + e // 32] |= np.uint32(
                    (int(codes[n, k]) >> j & 1) << e % 32
                )
    return words.view(np.int32)


def test_golden_bytes_per_channel() -> None:
    """N = 1, K = 9, codes 0..7 and 7: plane j holds bit j, channel k in bit k, the row is padded to
    16 bytes.
    """
    attrs = abq(1, 9, w=(3, 8))
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 7]], np.uint8)
    packed = SPEC.pack(
        QuantArrays(codes, np.ones((1, 1), np.float32), np.array([[-9]], np.int32)), attrs, "layer"
    )
    assert list(packed) == ["weight", "scale", "zero"]
    assert packed["weight"].shape == (3, 1, 4)
    assert (
        packed["weight"].tobytes().hex()
        == "aa01" + 14 * "00" + "cc01" + 14 * "00" + "f001" + 14 * "00"
    )
    assert packed["scale"].tobytes().hex() == "0000803f"
    assert packed["zero"].tobytes().hex() == "f7ffffff"


def test_golden_bytes_per_group() -> None:
    """N = 1, K = 10, groups of 5, codes 0/1: the second group starts in the second word."""
    attrs = abq(1, 10, w=(1, 2), g=5, bias=1)
    codes = np.array([[1, 0, 0, 1, 1, 0, 1, 1, 0, 1]], np.uint8)
    arrays = QuantArrays(
        codes,
        np.array([[1, 2]], np.float32),
        np.array([[0, 1]], np.int32),
        None,
        np.array([-2], np.float32),
    )
    packed = SPEC.pack(arrays, attrs, "layer")
    assert {name: array.tobytes().hex() for name, array in packed.items()} == {
        "weight": "19000000" + "16000000" + 16 * "0",
        "scale": "0000803f00000040",
        "zero": "0000000001000000",
        "bias": "000000c0",
    }


@pytest.mark.parametrize(
    ("n", "k", "g"),
    [(1, 1, 0), (3, 31, 0), (2, 129, 0), (5, 99, 33), (2, 120, 40), (3, 128, 32), (2, 24, 8)],
)
@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_pack_follows_the_layout_and_unpacks(w: tuple[int, int], n: int, k: int, g: int) -> None:
    attrs = abq(n, k, w=w, g=g, bias=n % 2)
    arrays = abq_arrays(attrs, seed=k)
    packed = SPEC.pack(arrays, attrs, "layer")
    assert list(packed) == SPEC.input_names(attrs)[1:]
    assert packed["weight"].dtype == np.int32 and all(
        array.flags.c_contiguous for array in packed.values()
    )
    np.testing.assert_array_equal(packed["weight"], planes_by_loops(arrays.codes, attrs))
    back = SPEC.unpack(packed, attrs)
    for field in ("codes", "scale", "zero", "bias"):
        want = getattr(arrays, field)
        np.testing.assert_array_equal(getattr(back, field), want)
        assert want is None or getattr(back, field).dtype == want.dtype
    assert back.scale_group is None


def test_pack_takes_rows_of_any_stride() -> None:
    attrs = abq(4, 33)
    arrays = abq_arrays(abq(8, 33))
    part = QuantArrays(arrays.codes[::2], arrays.scale[::2], arrays.zero[::2])  # type: ignore[index]
    np.testing.assert_array_equal(
        SPEC.pack(part, attrs, "layer")["weight"], planes_by_loops(part.codes, attrs)
    )


def test_rows_pack_alone() -> None:
    """Layers fused along N are their packed planes side by side."""
    attrs = abq(6, 70, g=35)
    arrays = abq_arrays(attrs)
    assert arrays.zero is not None
    halves = [
        QuantArrays(arrays.codes[rows], arrays.scale[rows], arrays.zero[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    parts = [
        SPEC.pack(half, replace(attrs, out_features=len(half.codes)), "layer")["weight"]
        for half in halves
    ]
    np.testing.assert_array_equal(
        SPEC.pack(arrays, attrs, "layer")["weight"], np.concatenate(parts, axis=1)
    )


def reference_by_loops(x: np.ndarray, arrays: QuantArrays, attrs: GemmAttributes) -> np.ndarray:
    """The formula with Python integers, then fp32 step by step."""
    codes, scale, zero = quantize_activation(x, attrs.abits, bool(attrs.act_symmetric))
    y = np.zeros((len(x), attrs.out_features), np.float32)
    for m in range(len(x)):
        for n in range(attrs.out_features):
            acc = np.float32(0)
            for g in range(attrs.n_groups):
                part = range(g * attrs.group_len, (g + 1) * attrs.group_len)
                zq = 0 if arrays.zero is None else int(arrays.zero[n, g])
                exact = sum(
                    (int(codes[m, k]) - int(zero[m, 0])) * (int(arrays.codes[n, k]) - zq)
                    for k in part
                )
                term = np.float32(np.float32(exact) * arrays.scale[n, g])
                if arrays.minimum is not None:
                    tokens_sum = sum(int(codes[m, k]) - int(zero[m, 0]) for k in part)
                    shift = np.float32(np.float32(tokens_sum) * arrays.minimum[n, g])
                    term = np.float32(term + shift)
                acc = np.float32(acc + term)
            y[m, n] = np.float32(acc * scale[m, 0])
            if arrays.bias is not None:
                y[m, n] = np.float32(y[m, n] + arrays.bias[n])
    return y


@pytest.mark.parametrize(("abits", "sym"), [(8, 0), (8, 1), (5, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize(("w", "g"), [((4, 16), 0), ((8, 256), 12), ((2, 5), 9)])
@pytest.mark.parametrize("minimum", [0, 1])
def test_reference_is_the_formula(
    w: tuple[int, int], g: int, abits: int, sym: int, minimum: int
) -> None:
    attrs = abq(4, 36, w=w, a=abits, sym=sym, g=g, bias=1, minimum=minimum)
    arrays, x = abq_arrays(attrs), tokens(3, 36, F32)
    np.testing.assert_array_equal(
        SPEC.reference(x, SPEC.pack(arrays, attrs, "layer"), attrs),
        reference_by_loops(x, arrays, attrs),
    )


def test_reference_with_far_zero_points_is_the_formula() -> None:
    attrs = abq(2, 20)
    arrays = replace(abq_arrays(attrs), zero=np.array([[-(2**31)], [2**31 - 1]], np.int32))
    x = tokens(3, 20, F32)
    np.testing.assert_array_equal(
        SPEC.reference(x, SPEC.pack(arrays, attrs, "layer"), attrs),
        reference_by_loops(x, arrays, attrs),
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(("g", "minimum"), [(0, 0), (24, 0), (24, 1)])
def test_weight_only_is_the_dequantised_product(dtype: np.dtype[Any], g: int, minimum: int) -> None:
    attrs = abq(5, 72, a=16, g=g, bias=1, minimum=minimum)
    arrays, x = abq_arrays(attrs), tokens(6, 72, dtype).reshape(2, 3, 72)
    y = SPEC.reference(x, SPEC.pack(arrays, attrs, "layer"), attrs)
    assert y.shape == (2, 3, 5) and y.dtype == dtype
    exact = x.astype(np.float64) @ SPEC.dequantize(arrays, attrs).astype(np.float64).T + arrays.bias
    np.testing.assert_allclose(
        y.astype(np.float64), exact, rtol={2: 2.0**-8, 4: 2.0**-20}[dtype.itemsize], atol=1e-5
    )


def test_trap_6_zero_points_outside_the_code_range() -> None:
    """An all-positive row has its zero point below every code; it is kept whole, not stored in 4
    bits.
    """
    attrs = abq(1, 4)
    arrays = QuantArrays(
        np.array([[0, 5, 10, 15]], np.uint8),
        np.array([[0.5]], np.float32),
        np.array([[-1000]], np.int32),
    )
    back = SPEC.unpack(SPEC.pack(arrays, attrs, "layer"), attrs)
    assert SPEC.dequantize(back, attrs).tolist() == [[500.0, 502.5, 505.0, 507.5]]


def test_trap_12_large_sums_are_scaled_before_the_cast() -> None:
    """An integer sum of over 65504 must not become fp16 infinity before its scale makes it small."""
    attrs = abq(1, 1024, w=(8, 256), sym=1)
    arrays = QuantArrays(
        np.full((1, 1024), 255, np.uint8),
        np.full((1, 1), 2.0**-20, np.float32),
        np.zeros((1, 1), np.int32),
    )
    y = SPEC.reference(np.full((1, 1024), 1.0, F16), SPEC.pack(arrays, attrs, "layer"), attrs)
    assert y.tolist() == [[float(np.float16(1024 * 255 / 2**20))]]


def test_trap_8_balanced_sets_take_the_planes_that_their_levels_need() -> None:
    assert [abq(1, 8, w=w).planes for w in ((2, 4), (2, 5), (1, 2), (1, 3))] == [2, 3, 1, 2]
    attrs = abq(1, 8, w=(2, 5))
    arrays = QuantArrays(
        np.array([[4, 0, 1, 2, 3, 4, 4, 0]], np.uint8),
        np.ones((1, 1), np.float32),
        np.full((1, 1), 2, np.int32),
    )
    assert SPEC.dequantize(
        SPEC.unpack(SPEC.pack(arrays, attrs, "layer"), attrs), attrs
    ).tolist() == [[2, -2, -1, 0, 1, 2, 2, -2]]


def test_trap_22_groups_are_contiguous() -> None:
    """Group g is exactly k in [g*G, (g+1)*G): there is no g_idx that packing could ignore."""
    attrs = abq(1, 40, w=(1, 2), g=8)
    scale = np.array([[1, 2, 4, 8, 16]], np.float32)
    arrays = QuantArrays(np.ones((1, 40), np.uint8), scale, np.zeros((1, 5), np.int32))
    back = SPEC.unpack(SPEC.pack(arrays, attrs, "layer"), attrs)
    assert SPEC.dequantize(back, attrs).tolist() == [np.repeat(scale[0], 8).tolist()]
    for k in range(40):  # a token that is non-zero at k alone sees the scale of group k // 8
        x = np.zeros((1, 40), np.float32)
        x[0, k] = 1
        y = SPEC.reference(
            x, SPEC.pack(arrays, replace(attrs, abits=16), "layer"), replace(attrs, abits=16)
        )
        assert y[0, 0] == scale[0, k // 8]


def test_dequantize_rounds_a_far_zero_point_once() -> None:
    attrs = abq(1, 2, w=(8, 256))
    arrays = QuantArrays(
        np.array([[3, 255]], np.uint8),
        np.ones((1, 1), np.float32),
        np.array([[2**24 + 4]], np.int32),
    )
    assert SPEC.dequantize(arrays, attrs).tolist() == [
        [-float(2**24 + 1 - 1), -float(2**24 + 4 - 255)]
    ]


def test_minimums_take_the_place_of_zero_points() -> None:
    """In the node's inputs, in the arrays of the quant folder and in the packed tensors; nothing of
    them is seen where there are none.
    """
    attrs = abq(3, 20, g=10, bias=1, minimum=1)
    arrays = abq_arrays(attrs)
    assert SPEC.input_names(attrs) == ["X", "weight", "scale", "minimum", "bias"]
    stored = {array.name: (array.dtype, array.shape) for array in SPEC.arrays(attrs)}
    assert stored["minimum"] == ("float32", (3, 2)) and "zero" not in stored
    back = SPEC.unpack(SPEC.pack(arrays, attrs, "layer"), attrs)
    assert back.named().keys() == arrays.named().keys()
    for name, array in arrays.named().items():
        np.testing.assert_array_equal(back.named()[name], array)
    assert attrs.as_dict()["has_minimum"] == 1
    assert "has_minimum" not in replace(attrs, has_minimum=0).as_dict()
    assert SPEC.affine(attrs) is None and op_spec("QQQGemm").objection(attrs) == (
        "got weights with minimums, expected symmetric ones",
        "Use --method abq",
    )


def test_a_weight_with_a_minimum_is_rounded_twice() -> None:
    attrs = abq(1, 2, w=(8, 256), minimum=1)
    scale, minimum = np.float32(1 / 3), np.float32(-7.77)
    arrays = QuantArrays(
        np.array([[255, 3]], np.uint8), np.full((1, 1), scale), minimum=np.full((1, 1), minimum)
    )
    want = [np.float32(np.float32(code) * scale) + minimum for code in (255, 3)]
    assert SPEC.dequantize(arrays, attrs).tolist() == [want]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minimum": None}, "got no minimums, expected fp32 minimums of shape (2, 3)"),
        (
            {"minimum": np.zeros((2, 3))},
            "got minimums float64 of shape (2, 3), expected fp32 minimums of shape (2, 3)",
        ),
        (
            {"minimum": np.zeros((2, 1), np.float32)},
            "got minimums float32 of shape (2, 1), expected fp32 minimums of shape (2, 3)",
        ),
        (
            {"minimum": np.full((2, 3), np.inf, np.float32)},
            "got a minimum that is NaN or inf in output channel 0, expected finite numbers",
        ),
        (
            {"zero": np.zeros((2, 3), np.int32)},
            "got zero points beside the minimums, expected fp32 minimums of shape (2, 3)",
        ),
    ],
)
def test_pack_refuses_minimums(fields: dict[str, Any], message: str) -> None:
    attrs = abq(2, 24, g=8, minimum=1)
    with pytest.raises(InputError) as error:
        SPEC.pack(replace(abq_arrays(attrs), **fields), attrs, "layer q_proj")
    assert str(error.value) == f"layer q_proj: {message}. Quantise the layer again."


GOOD = abq(2, 24, g=8)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        (
            replace(GOOD, wbits=9, levels=512),
            "got 9 weight bits, expected 1 to 8. Choose other --wbits.",
        ),
        (
            replace(GOOD, abits=1),
            "got 1 activation bits, expected 2 to 8, or 16 for weight-only. Choose other --abits.",
        ),
        (
            replace(GOOD, abits=9),
            "got 9 activation bits, expected 2 to 8, or 16 for weight-only. Choose other --abits.",
        ),
        (
            replace(GOOD, levels=5),
            "got 5 weight levels with 4 bits, expected 16 (W4). Quantise the layer again.",
        ),
        (
            replace(GOOD, wbits=2, levels=3),
            "got 3 weight levels with 2 bits, expected 4 (W2) or 5 (W2*). Quantise the layer again.",
        ),
        (
            replace(GOOD, group_size=7),
            "got group size 7, expected 0 or a divisor of in_features 24. Use one of 0, 1, 2, "
            "3, 4, 6, 8, 12, 24.",
        ),
        (
            replace(GOOD, out_features=0),
            "got a weight of 0 x 24, expected at least 1 x 1. Check the model.",
        ),
        (
            abq(2, 65_794, w=(8, 256)),
            "got sums of up to 2147516160, expected less than 2^31 for int32. Use a smaller "
            "--group-size.",
        ),
    ],
)
def test_check_refuses(attrs: GemmAttributes, message: str) -> None:
    with pytest.raises(InputError) as error:
        SPEC.check(attrs, "layer q_proj")
    assert str(error.value) == f"layer q_proj: {message}"


def test_check_accepts_the_longest_sums() -> None:
    SPEC.check(abq(1, 65_793, w=(8, 256)), "layer")
    SPEC.check(abq(1, 10**6, w=(8, 256), a=16), "layer")


def changed(**fields: Any) -> QuantArrays:
    return replace(abq_arrays(GOOD), **fields)


def test_trap_19_pack_refuses_codes_out_of_range() -> None:
    """Codes are packed as they are: nothing re-derives, wraps or clips them."""
    codes = abq_arrays(GOOD).codes.copy()
    codes[1, 3] = 16
    for bad, got in (
        (codes, "uint8 up to 16"),
        (codes.astype(np.int64), "int64 up to 16"),
        (codes / np.float32(2), "float32 up to 8.0"),
    ):
        with pytest.raises(InputError) as error:
            SPEC.pack(changed(codes=bad), GOOD, "layer q_proj")
        assert str(error.value) == (
            f"layer q_proj: got codes {got}, expected uint8 0 to 15. "
            "Quantise the layer again; codes are packed as they are, never re-derived."
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": np.zeros((2, 23), np.uint8)}, "got codes of shape (2, 23), expected (2, 24)"),
        ({"scale": np.ones((2, 1), np.float32)}, "got scales of shape (2, 1), expected (2, 3)"),
        ({"zero": None}, "got no zero points, expected integers of shape (2, 3)"),
        (
            {"zero": np.zeros((2, 3), np.float32)},
            "got zero points float32 of shape (2, 3), expected integers of shape (2, 3)",
        ),
        (
            {"zero": np.zeros((3, 2), np.int32)},
            "got zero points int32 of shape (3, 2), expected integers of shape (2, 3)",
        ),
        ({"bias": np.zeros(2, np.float32)}, "got a bias, expected has_bias=0"),
        (
            {"scale": np.array([[1, 1, 1], [1, np.nan, 1]], np.float32)},
            "got a scale that is NaN or inf in output channel 1, expected finite numbers",
        ),
        (
            {"scale": np.full((2, 3), 1e300)},
            "got a scale that is NaN or inf in output channel 0, expected finite numbers",
        ),
    ],
)
def test_pack_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        SPEC.pack(changed(**fields), GOOD, "layer q_proj")
    assert str(error.value) == f"layer q_proj: {message}. Quantise the layer again."


def test_pack_refuses_zero_points_that_do_not_fit() -> None:
    with pytest.raises(InputError) as error:
        SPEC.pack(changed(zero=np.full((2, 3), 2**31)), GOOD, "layer q_proj")
    assert str(error.value) == (
        "layer q_proj: got zero points from 2147483648 to 2147483648, expected -2147483648 to "
        "2147483647. "
        "Quantise the layer again with ranges that reach closer to 0."
    )


def test_pack_refuses_a_missing_or_wrong_bias() -> None:
    attrs = replace(GOOD, has_bias=1)
    for bias, message in (
        (None, "got no bias, expected has_bias=1"),
        (np.zeros(3), "got a bias of shape (3,), expected (2,)"),
    ):
        with pytest.raises(InputError) as error:
            SPEC.pack(changed(bias=bias), attrs, "layer q_proj")
        assert str(error.value) == f"layer q_proj: {message}. Quantise the layer again."
