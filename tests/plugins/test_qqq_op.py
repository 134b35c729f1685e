"""QQQGemm: packed bytes against the written-out layout, exact arithmetic, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plugins import op_spec
from plugins.core.activation import quantize_activation
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError
from tests.plugins.kernel_cases import BF16, F16, F32, qqq, qqq_arrays, tokens

SPEC = op_spec("QQQGemm")
GROUP_NIBBLES = {
    (0, 0): 0,
    (0, 2): 1,
    (1, 0): 2,
    (1, 2): 3,
    (0, 1): 4,
    (0, 3): 5,
    (1, 1): 6,
    (1, 3): 7,
}


def words_by_loops(codes: np.ndarray, attrs: GemmAttributes) -> np.ndarray:
    """The layout formula, code by code, padding included."""
    n_pad, k_pad = -(-attrs.out_features // 64) * 64, -(-attrs.in_features // 16) * 16
    words = np.zeros((k_pad // 16, 2 * n_pad), np.uint32)
    for n in range(n_pad):
        for k in range(k_pad):
            code = int(codes[n, k]) if n < attrs.out_features and k < attrs.in_features else 0
            lane, j, b, r = 4 * (n % 8) + k % 16 // 4, n % 64 // 16, n % 16 // 8, k % 4
            nibble = GROUP_NIBBLES[b, r] if attrs.group_size else 2 * r + 1 - b
            value = code + 8 if attrs.group_size else code & 15
            words[k // 16, 128 * (n // 64) + 4 * lane + j] |= np.uint32(value << 4 * nibble)
    return words.view(np.int32)


def test_golden_bytes_per_channel() -> None:
    """N = 9, K = 5. Word 0 is lane 0 (n = 0 and 8, k = 0..3): byte r is n = 8 low, n = 0 high. Word
    4 is lane 1 (k = 4).
    """
    attrs = qqq(9, 5)
    codes = np.zeros((9, 5), np.int8)
    codes[0] = [1, -2, 3, -4, 5]
    codes[8] = [-1, 2, -3, 4, -8]
    packed = SPEC.pack(QuantArrays(codes, np.full((9, 1), 2, np.float32)), attrs, "layer")
    assert list(packed) == ["weight", "scale"]
    assert packed["weight"].shape == (1, 128)
    assert (
        packed["weight"].tobytes().hex()
        == "1fe23dc4" + 12 * "00" + "58000000" + 12 * "00" + 480 * "00"
    )
    assert packed["scale"].tobytes().hex() == 9 * "00000040"


def test_golden_bytes_per_group() -> None:
    """N = 9, K = 64, codes q + 8: byte 0 is (r0, r2) of n = 0, byte 1 of n = 8, bytes 2 and 3 the
    same for (r1, r3).
    """
    attrs = qqq(9, 64, g=64)
    codes = np.zeros((9, 64), np.int8)
    codes[0, :4] = [1, -2, 3, -4]
    codes[8, :4] = [-1, 2, -3, 7]
    arrays = QuantArrays(
        codes, np.ones((9, 1), np.float32), None, np.arange(9, dtype=np.float16)[:, None]
    )
    packed = SPEC.pack(arrays, attrs, "layer")
    assert list(packed) == ["weight", "scale", "scale_group"]
    assert packed["weight"].shape == (4, 128)
    assert packed["weight"].tobytes().hex() == "b95746fa" + (4 * 512 - 4) * "88"
    assert packed["scale_group"].shape == (1, 9)
    assert packed["scale_group"].tobytes().hex() == "0000003c0040004200440045004600470048"


@pytest.mark.parametrize(
    ("n", "k", "g"),
    [
        (1, 1, 0),
        (63, 15, 0),
        (64, 16, 0),
        (65, 17, 0),
        (130, 100, 0),
        (3, 64, 64),
        (70, 192, 64),
        (129, 128, 128),
    ],
)
def test_pack_follows_the_layout_and_unpacks(n: int, k: int, g: int) -> None:
    attrs = qqq(n, k, g=g, bias=n % 2)
    arrays = replace(
        qqq_arrays(attrs, seed=k),
        codes=np.random.default_rng(n).integers(-8, 8, (n, k), dtype=np.int8),
    )
    packed = SPEC.pack(arrays, attrs, "layer")
    assert list(packed) == SPEC.input_names(attrs)[1:]
    assert packed["weight"].dtype == np.int32 and all(
        array.flags.c_contiguous for array in packed.values()
    )
    np.testing.assert_array_equal(packed["weight"], words_by_loops(arrays.codes, attrs))
    back = SPEC.unpack(packed, attrs)
    for field in ("codes", "scale", "scale_group", "bias"):
        want = getattr(arrays, field)
        np.testing.assert_array_equal(getattr(back, field), want)
        assert want is None or getattr(back, field).dtype == want.dtype
    assert back.zero is None


def test_pack_takes_rows_of_any_stride() -> None:
    attrs = qqq(4, 33)
    arrays = qqq_arrays(qqq(8, 33))
    part = QuantArrays(arrays.codes[::2], arrays.scale[::2])
    np.testing.assert_array_equal(
        SPEC.pack(part, attrs, "layer")["weight"], words_by_loops(part.codes, attrs)
    )


def int8_by_loops(arrays: QuantArrays, attrs: GemmAttributes) -> list[list[int]]:
    """The second rounding, one weight at a time."""
    if arrays.scale_group is None:
        return [[int(code) for code in row] for row in arrays.codes]
    return [
        [
            min(
                max(
                    round(
                        float(
                            np.float32(code)
                            * np.float32(arrays.scale_group[n, k // attrs.group_size])
                        )
                    ),
                    -127,
                ),
                127,
            )
            for k, code in enumerate(row)
        ]
        for n, row in enumerate(arrays.codes)
    ]


@pytest.mark.parametrize(("k", "g"), [(37, 0), (128, 64), (128, 128)])
def test_reference_is_the_formula(k: int, g: int) -> None:
    attrs = qqq(5, k, g=g, bias=1)
    arrays, x = qqq_arrays(attrs), tokens(3, k, F32)
    codes, scale, _ = quantize_activation(x, 8, True)
    weight = int8_by_loops(arrays, attrs)
    want = np.zeros((3, 5), np.float32)
    assert arrays.bias is not None
    for m in range(3):
        for n in range(5):
            exact = sum(int(a) * w for a, w in zip(codes[m], weight[n], strict=True))
            scaled = np.float32(np.float32(np.float32(exact) * arrays.scale[n, 0]) * scale[m, 0])
            want[m, n] = np.float32(scaled + arrays.bias[n])
    np.testing.assert_array_equal(SPEC.reference(x, SPEC.pack(arrays, attrs, "layer"), attrs), want)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_output_has_the_type_and_leading_axes_of_x(dtype: np.dtype[Any]) -> None:
    attrs = qqq(3, 20)
    packed = SPEC.pack(qqq_arrays(attrs), attrs, "layer")
    x = tokens(6, 20, dtype)
    flat = SPEC.reference(x, packed, attrs)
    y = SPEC.reference(x.reshape(2, 3, 20), packed, attrs)
    assert y.dtype == dtype and y.shape == (2, 3, 3)
    np.testing.assert_array_equal(y.reshape(6, 3), flat)


@pytest.mark.parametrize("g", [0, 64])
def test_trap_18_zero_tokens_give_the_bias(g: int) -> None:
    attrs = qqq(3, 64, g=g, bias=1)
    arrays = qqq_arrays(attrs)
    x = np.array([0.0, -0.0], F16)[:, None] * np.ones((1, 64), F16)
    assert arrays.bias is not None
    np.testing.assert_array_equal(
        SPEC.reference(x, SPEC.pack(arrays, attrs, "layer"), attrs),
        np.tile(arrays.bias.astype(F16), (2, 1)),
    )


def test_trap_19_pack_refuses_codes_out_of_range() -> None:
    """+8 would become -8 in four bits; codes are integers of the quantiser, never round(weight /
    scale) again.
    """
    attrs = qqq(2, 16)
    codes = np.zeros((2, 16), np.int8)
    for value, kind, got in (
        (8, np.int8, "int8 0 to 8"),
        (-9, np.int8, "int8 -9 to 0"),
        (7, np.int32, "int32 0 to 7"),
    ):
        bad = codes.astype(kind)
        bad[1, 15] = value
        with pytest.raises(InputError) as error:
            SPEC.pack(QuantArrays(bad, np.ones((2, 1), np.float32)), attrs, "layer q_proj")
        assert str(error.value) == (
            f"layer q_proj: got codes {got}, expected int8 -8 to 7. "
            "Quantise the layer again; codes are packed as they are, never re-derived."
        )


def test_trap_20_dequantize_is_what_the_kernel_multiplies() -> None:
    """A weight of 1.3 in int8 units is 1, not 1.3: the second rounding is part of the numbers."""
    attrs = qqq(1, 64, g=64)
    codes = np.resize(np.arange(-8, 8, dtype=np.int8), (1, 64))
    arrays = QuantArrays(
        codes, np.full((1, 1), 0.5, np.float32), None, np.full((1, 1), 1.3, np.float16)
    )
    rounded = np.rint(codes[0].astype(np.float32) * np.float32(np.float16(1.3)))
    assert SPEC.dequantize(arrays, attrs).tolist() == [(0.5 * rounded).tolist()]
    # One-hot tokens of 127 have scale 1, so that each output is one dequantised weight.
    y = SPEC.reference(np.eye(64, dtype=np.float32) * 127, SPEC.pack(arrays, attrs, "layer"), attrs)
    np.testing.assert_array_equal(y[:, 0], SPEC.dequantize(arrays, attrs)[0] * 127)


@pytest.mark.parametrize("g", [0, 64])
def test_trap_21_no_hidden_clipping(g: int) -> None:
    """Signed codes come back as they were at both ends, -8 and +7 included, and so do their
    weights.
    """
    attrs = qqq(2, 64, g=g)
    codes = np.stack(
        [np.resize(np.array([7, -7], np.int8), 64), np.resize(np.array([-8, 7], np.int8), 64)]
    )
    scale_group = np.full((2, 1), 15, np.float16) if g else None
    back = SPEC.unpack(
        SPEC.pack(
            QuantArrays(codes, np.ones((2, 1), np.float32), None, scale_group), attrs, "layer"
        ),
        attrs,
    )
    np.testing.assert_array_equal(back.codes, codes)
    np.testing.assert_array_equal(
        SPEC.dequantize(back, attrs), codes.astype(np.float32) * (15 if g else 1)
    )


def test_int8_weights_stay_within_127() -> None:
    attrs = qqq(1, 64, g=64)
    arrays = QuantArrays(
        np.resize(np.array([-8, 7], np.int8), (1, 64)),
        np.ones((1, 1), np.float32),
        None,
        np.full((1, 1), 20, np.float16),
    )
    assert SPEC.dequantize(arrays, attrs)[0, :2].tolist() == [-127, 127]


def test_trap_22_groups_are_contiguous() -> None:
    """Group g is exactly k in [g*64, (g+1)*64): there is no g_idx that packing could ignore."""
    attrs = qqq(1, 192, g=64)
    arrays = QuantArrays(
        np.ones((1, 192), np.int8),
        np.ones((1, 1), np.float32),
        None,
        np.array([[3, 50, 7]], np.float16),
    )
    back = SPEC.unpack(SPEC.pack(arrays, attrs, "layer"), attrs)
    assert SPEC.dequantize(back, attrs).tolist() == [64 * [3.0] + 64 * [50.0] + 64 * [7.0]]


def test_trap_25_fp16_output_saturates() -> None:
    attrs = qqq(2, 16)
    codes = np.stack([np.full(16, 7, np.int8), np.full(16, -7, np.int8)])
    packed = SPEC.pack(QuantArrays(codes, np.full((2, 1), 1000, np.float32)), attrs, "layer")
    assert SPEC.reference(np.ones((1, 16), F16), packed, attrs).tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        (
            replace(qqq(2, 64), wbits=3, levels=8),
            "got W3A8, expected W4A8 with symmetric activations. "
            "Use --wbits 4 --abits 8, or --method abq for other bits.",
        ),
        (
            replace(qqq(2, 64), levels=5),
            "got W4 (5 levels) A8, expected W4A8 with symmetric activations. "
            "Use --wbits 4 --abits 8, or --method abq for other bits.",
        ),
        (
            replace(qqq(2, 64), act_symmetric=0),
            "got W4A8 with asymmetric activations, expected W4A8 with symmetric activations. "
            "Use --wbits 4 --abits 8, or --method abq for other bits.",
        ),
        (
            qqq(2, 64, g=32),
            "got group size 32, expected 0, 64 or 128. Use one of these, or --method abq.",
        ),
        (
            qqq(2, 72, g=64),
            "got group size 64, expected 0 or a divisor of in_features 72. Use one of 0, 1, 2, "
            "3, 4, 6, 8, 9, 12, 18, 24, 36, 72.",
        ),
        (qqq(0, 64), "got a weight of 0 x 64, expected at least 1 x 1. Check the model."),
        (
            qqq(2, 133_145),
            "got in_features 133145, expected at most 133144: the int32 sum would overflow. "
            "Use --method abq with a group size.",
        ),
    ],
)
def test_check_refuses(attrs: GemmAttributes, message: str) -> None:
    with pytest.raises(InputError) as error:
        SPEC.check(attrs, "layer q_proj")
    assert str(error.value) == f"layer q_proj: {message}"


@pytest.mark.parametrize(
    ("g", "fields", "message"),
    [
        (0, {"codes": np.zeros((2, 63), np.int8)}, "got codes of shape (2, 63), expected (2, 64)"),
        (0, {"scale": np.ones(2, np.float32)}, "got scales of shape (2,), expected (2, 1)"),
        (
            0,
            {"scale_group": np.ones((2, 1), np.float16)},
            "got group scales of shape (2, 1), expected None",
        ),
        (64, {"scale_group": None}, "got group scales of shape None, expected (2, 1)"),
        (
            64,
            {"scale_group": np.ones((1, 2), np.float16)},
            "got group scales of shape (1, 2), expected (2, 1)",
        ),
        (
            64,
            {"scale_group": np.full((2, 1), 70_000, np.float32)},
            "got a scale_group that is NaN or inf in output channel 0, expected finite numbers",
        ),
        (
            0,
            {"scale": np.array([[1], [np.inf]], np.float32)},
            "got a scale that is NaN or inf in output channel 1, expected finite numbers",
        ),
        (0, {"bias": np.ones(2, np.float32)}, "got a bias, expected has_bias=0"),
    ],
)
def test_pack_refuses(g: int, fields: dict[str, Any], message: str) -> None:
    attrs = qqq(2, 64, g=g)
    with pytest.raises(InputError) as error:
        SPEC.pack(replace(qqq_arrays(attrs), **fields), attrs, "layer q_proj")
    assert str(error.value) == f"layer q_proj: {message}. Quantise the layer again."
