"""The torch twin against the numpy definition: equal codes, and the same GEMM numbers up to fp32
accumulation.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.methods.rtn import quantize
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.fake_quant import (
    ActivationQuantizer,
    FakeQuantLinear,
    quantize_activation,
    round_to,
)
from plugins import op_spec
from plugins.core.activation import quantize_activation as numpy_quantize_activation
from plugins.core.activation import saturate_cast
from tests.plugins.kernel_cases import F32, abq_arrays, tokens


def _rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 37)).astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2] = 1e-42  # subnormal
    x[3, 4] = 6e4  # outlier
    x[4] = np.abs(x[4])
    x[5] = -np.abs(x[5])
    x[6] = 2.5
    x[7] *= 1e-30
    x[8] *= 1e30
    x[9] = np.arange(37) - 18 + 0.5  # ties
    x[10] = np.linspace(-127, 127, 37)
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_of_the_definition(bits: int, symmetric: bool) -> None:
    x = _rows()
    codes, scale, zero = quantize_activation(torch.from_numpy(x), bits, symmetric)
    expected_codes, expected_scale, expected_zero = numpy_quantize_activation(x, bits, symmetric)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gets_a_nan_scale(bad: float, symmetric: bool) -> None:
    x = _rows()
    x[20, 3] = bad
    scale = quantize_activation(torch.from_numpy(x), 8, symmetric)[1].numpy()
    np.testing.assert_array_equal(scale, numpy_quantize_activation(x, 8, symmetric)[1])
    assert np.isnan(scale[20]).all() and np.isfinite(np.delete(scale, 20)).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounding_is_that_of_the_kernels(name: str) -> None:
    import ml_dtypes

    y = np.array(
        [1.0, 1 / 3, 65504.0, 65519.0, 65520.0, 1e6, -1e6, 3.3e38, -3.4e38, 1e-8, -0.0, np.nan],
        np.float32,
    )
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    np.testing.assert_array_equal(
        round_to(torch.from_numpy(y), name).numpy(), saturate_cast(y, dtype).astype(np.float32)
    )


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme("ABQGemm", "rtn", 4, 8),
        QuantScheme("ABQGemm", "rtn", 2, 8, True, 16),
        QuantScheme("ABQGemm", "rtn", 3, 4, act_symmetric=True),
        QuantScheme("ABQGemm", "rtn", 4, 16),
        QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True),
        QuantScheme("QQQGemm", "rtn", 4, 8, False, 64, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_the_reference_of_the_op(scheme: QuantScheme, has_bias: bool) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((24, 128)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32) if has_bias else None
    x = rng.standard_normal((2, 5, 128)).astype(np.float32)
    linear = QuantLinear("test", scheme, quantize(weight, bias, scheme))
    spec = op_spec(scheme.op)
    expected = spec.reference(
        x, spec.pack(linear.arrays, linear.attributes, "test"), linear.attributes
    )
    quantizer = (
        ActivationQuantizer(scheme.abits, scheme.act_symmetric) if scheme.abits < 16 else None
    )
    module = FakeQuantLinear(linear, quantizer, "float32")
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), expected, rtol=2e-5, atol=2e-4)
    assert (module.in_features, module.out_features) == (128, 24)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme("ABQGemm", "rtn", 4, 8, group_size=32, has_minimum=True),
        QuantScheme("ABQGemm", "rtn", 8, 8, group_size=16, act_symmetric=True, has_minimum=True),
        QuantScheme("ABQGemm", "rtn", 5, 3, has_minimum=True),
        QuantScheme("ABQGemm", "rtn", 4, 16, group_size=32, has_minimum=True),
    ],
    ids=lambda scheme: scheme.label,
)
def test_minimums_are_those_of_the_op(scheme: QuantScheme) -> None:
    attrs = scheme.attributes(24, 128, True)
    arrays, x = abq_arrays(attrs), tokens(7, 128, F32)
    spec = op_spec(scheme.op)
    want = spec.reference(x, spec.pack(arrays, attrs, "test"), attrs)
    bits = scheme.abits
    quantizer = ActivationQuantizer(bits, scheme.act_symmetric) if bits < 16 else None
    got = FakeQuantLinear(QuantLinear("test", scheme, arrays), quantizer)(torch.from_numpy(x))
    if bits < 16:
        np.testing.assert_array_equal(got.numpy(), want)
    else:
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-4)


def test_quantizer_does_not_reuse_codes_of_a_changed_tensor() -> None:
    quantizer = ActivationQuantizer(8, True)
    x = torch.randn(3, 8)
    first = quantizer(x)
    assert quantizer(x) is first
    x.mul_(2.0)
    torch.testing.assert_close(quantizer(x).scale, first.scale * 2)
