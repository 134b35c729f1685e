"""GEMMs with an RMSNorm in front: reference() against its definition, and every kernel against
reference().
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from plugins import op_spec
from plugins.core.activation import rms_norm
from plugins.core.op_spec import GemmAttributes
from plugins.errors import InputError
from plugins.tools.kernels import ANY_TACTIC, KERNEL_STEP, SIMPLE, gemm_shape
from tests.plugins.kernel_cases import (
    BF16,
    F16,
    F32,
    abq,
    abq_arrays,
    assert_close,
    assert_same_bits,
    op_of,
    qqq,
    qqq_arrays,
    tokens,
)
from tests.plugins.kernel_runner import KernelError, KernelRunner

MANY, FEW = 132, 1  # multiprocessors: K is split among many blocks, or not at all
EPSILON = 3.0  # of tokens of +-1: the root of the mean square is then exactly 2
K = 320
SCHEMES = {
    "abq": abq(70, K, bias=1),
    "abq-sym": abq(70, K, a=5, sym=1),
    "abq-few": abq(70, K, w=(2, 5), a=3),
    "abq-g64": abq(70, K, g=64, bias=1),
    "abq-g40": abq(70, K, g=40),
    "a16": abq(70, K, a=16, bias=1),
    "a16-g64": abq(70, K, w=(8, 256), a=16, g=64),
    "qqq": qqq(70, K, bias=1),
    "qqq-g64": qqq(70, K, g=64),
}


def case_of(
    name: str, epsilon: float, dtype: np.dtype[Any]
) -> tuple[GemmAttributes, Any, dict[str, np.ndarray]]:
    """Attributes with a norm, weights, and the packed tensors with a gamma that has outliers."""
    attrs = replace(SCHEMES[name], norm_epsilon=epsilon)
    arrays = qqq_arrays(attrs) if name.startswith("qqq") else abq_arrays(attrs)
    gamma = tokens(1, attrs.in_features, dtype, seed=1)[0]
    return attrs, arrays, op_spec(op_of(arrays)).pack(arrays, attrs, "test") | {"gamma": gamma}


def signs(m: int, k: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Tokens of +-1, and the last of zeros: every order of adding up their squares gives the same,
    so that no rounding is a near tie.
    """
    x = np.random.default_rng(m).choice(np.array([-1, 1]), (m, k))
    x[-1] = 0
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_rms_norm_is_the_formula(dtype: np.dtype[Any]) -> None:
    x, gamma = tokens(3, 200, dtype), tokens(1, 200, dtype, seed=1)[0]
    got = rms_norm(x, gamma, 1e-5)
    assert got.dtype == dtype
    for row, y in zip(x.astype(float), got.astype(float), strict=True):
        want = (
            row
            / (sum(v * v for v in row) / 200 + float(np.float32(1e-5))) ** 0.5
            * gamma.astype(float)
        )
        np.testing.assert_allclose(y, want, rtol=0.51 * float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("name", SCHEMES)
def test_reference_is_the_gemm_of_the_norm(name: str) -> None:
    attrs, arrays, tensors = case_of(name, 1e-5, F16)
    spec, x = op_spec(op_of(arrays)), tokens(6, K, F16).reshape(2, 3, K)
    plain = replace(attrs, norm_epsilon=0.0)
    want = spec.reference(rms_norm(x, tensors["gamma"], 1e-5), tensors, plain)
    assert_same_bits(spec.reference(x, tensors, attrs), want)
    assert spec.input_names(attrs) == [*spec.input_names(plain), "gamma"]


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_tactic_norms(runner: KernelRunner, name: str, dtype: np.dtype[Any]) -> None:
    """Where nothing rounds before the codes, every kernel gives the bits that it gives without a
    norm.
    """
    attrs, arrays, tensors = case_of(name, EPSILON, dtype)
    spec, kernels = op_spec(op_of(arrays)), set()
    for m, multiprocessors in ((1, MANY), (3, FEW), (17, MANY)):
        x = np.concatenate([signs(m, K, dtype)[:-1], signs(2, K, dtype)])[-m:]
        want, normed = spec.reference(x, tensors, attrs), rms_norm(x, tensors["gamma"], EPSILON)
        np.testing.assert_array_equal(normed, x * (tensors["gamma"] / np.asarray(2, dtype)))
        runner.set_device(90, multiprocessors)
        for tactic, kernel in runner.tactics(spec.name, attrs, m, dtype).items():
            y = runner.gemm(spec.name, attrs, x, tensors, tactic=tactic)
            reordered = spec.name == "ABQGemm" and attrs.n_groups > 1 and tactic % KERNEL_STEP > 1
            assert_close(y, want, attrs, arrays, normed, reordered)
            kernels.add(kernel)
    assert len(kernels) > 1 or runner.isa or (attrs.abits, dtype) == (16, F32), kernels


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_any_tokens(runner: KernelRunner, name: str, dtype: np.dtype[Any]) -> None:
    """The simple kernel and those of a CPU give reference()'s bits; of the others a near tie may move
    a code, or the scale in its last bit.
    """
    attrs, arrays, tensors = case_of(name, 1e-5, dtype)
    spec, x = op_spec(op_of(arrays)), tokens(5, K, dtype)
    want, normed = spec.reference(x, tensors, attrs), rms_norm(x, tensors["gamma"], 1e-5)
    runner.set_device(90, MANY)
    for tactic in runner.tactics(spec.name, attrs, len(x), dtype):
        y = runner.gemm(spec.name, attrs, x, tensors, tactic=tactic)
        if runner.isa or tactic // KERNEL_STEP == SIMPLE // KERNEL_STEP:
            assert_close(y, want, attrs, arrays, normed)
        error = np.linalg.norm(
            y.astype(np.float64) - want.astype(np.float64), axis=1
        ) / np.linalg.norm(want.astype(np.float64), axis=1)
        assert error.max() < {F16: 2e-3, BF16: 8e-3, F32: 1e-3}[dtype], (tactic, error)


@pytest.mark.parametrize("order", range(4))
def test_any_thread_order(runner: KernelRunner, order: int) -> None:
    runner.set_order(order)
    attrs, arrays, tensors = case_of("qqq", EPSILON, F16)
    x = signs(3, K, F16)
    for tactic in (SIMPLE, 0):
        assert_close(
            runner.gemm("QQQGemm", attrs, x, tensors, tactic=tactic),
            op_spec("QQQGemm").reference(x, tensors, attrs),
            attrs,
            arrays,
            x,
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_are_nan_and_alone(runner: KernelRunner, bad: float) -> None:
    runner.set_device(90, MANY)
    for name in ("abq", "abq-g64", "a16", "qqq"):
        attrs, arrays, tensors = case_of(name, 1e-5, F16)
        x, spec = tokens(4, K, F16), op_spec(op_of(arrays))
        x[1, 0], x[3] = bad, 0
        for y in (
            spec.reference(x, tensors, attrs),
            *(
                runner.gemm(spec.name, attrs, x, tensors, tactic=tactic)
                for tactic in runner.tactics(spec.name, attrs, 4, F16)
            ),
        ):
            assert np.isnan(y).all(axis=1).tolist() == [False, True, False, False]


def test_workspace_has_room_for_the_norm_of_the_simple_kernel_only(
    gpu_runner: KernelRunner,
) -> None:
    for op, attrs in (
        ("ABQGemm", abq(64, 1024)),
        ("ABQGemm", abq(64, 1024, a=16)),
        ("QQQGemm", qqq(64, 1024)),
    ):
        normed = replace(attrs, norm_epsilon=1e-5)
        for tactic, name in gpu_runner.tactics(op, attrs, 8, F16).items():
            grown = gpu_runner.kernels.workspace_bytes(
                op, gemm_shape(normed, 8, F16, tactic)
            ) - gpu_runner.kernels.workspace_bytes(op, gemm_shape(attrs, 8, F16, tactic))
            assert grown == (8 * 1024 * 2 if name == "simple" else 0)
        assert (
            gpu_runner.kernels.workspace_bytes(op, gemm_shape(normed, 8, F16, ANY_TACTIC))
            >= 8 * 1024 * 2
        )


def test_a_missing_gamma_and_a_bad_epsilon_are_refused(runner: KernelRunner) -> None:
    for name in ("abq", "qqq"):
        attrs, arrays, tensors = case_of(name, 1e-5, F16)
        op, x = op_of(arrays), tokens(2, K, F16)
        del tensors["gamma"]
        bad = [replace(attrs, norm_epsilon=epsilon) for epsilon in (-1e-5, np.inf, np.nan)]
        for refused in (attrs, *bad):
            with pytest.raises(KernelError) as error:
                runner.gemm(op, refused, x, tensors)
            assert error.value.code == 1
        assert not any(
            runner.kernels.workspace_bytes(op, gemm_shape(refused, 2, F16)) for refused in bad
        )


@pytest.mark.parametrize(
    ("epsilon", "text"), [(-1.0, "-1.0"), (float("nan"), "nan"), (1e39, "1e+39"), (1e-50, "1e-50")]
)
@pytest.mark.parametrize("name", ["abq", "qqq"])
def test_check_refuses(name: str, epsilon: float, text: str) -> None:
    attrs = replace(SCHEMES[name], norm_epsilon=epsilon)
    with pytest.raises(InputError) as error:
        op_spec("QQQGemm" if name == "qqq" else "ABQGemm").check(attrs, "layer")
    assert str(error.value) == (
        f"layer: got norm_epsilon {text}, expected 0 (no norm) or a positive fp32 number. "
        "Check rms_norm_eps in the model's config.json."
    )
