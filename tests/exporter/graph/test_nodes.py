"""The function bodies of the custom nodes in stock ONNX Runtime, bit for bit against the numpy
references.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.graph.nodes import NodeFactory
from plugins import op_spec
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from tests.exporter.node_cases import ELEMENT, Case, abq_case, check, model_of, qqq_case, session_of
from tests.plugins.kernel_cases import BF16, F16, F32, LEVELS, abq, both_ops, qqq, tokens


@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_abq_every_bit_width(w: tuple[int, int]) -> None:
    cases = [
        abq_case(5, 67, w=w, a=a, sym=sym)
        for a, sym in itertools.product((2, 3, 4, 5, 6, 7, 8), (0, 1))
    ]
    check([*cases, abq_case(5, 67, w=w, a=16)], tokens(40, 67, F16))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_types_ranks_groups_and_bias(rank: int, dtype: np.dtype[Any]) -> None:
    x = tokens(6, 384, dtype).reshape(*((6,) if rank == 2 else (2, 3)), 384)
    cases = [
        abq_case(7, 384, a=a, g=g, bias=g > 0)
        for a, g in ((8, 0), (4, 24), (8, 128), (16, 0), (16, 64))
    ]
    check([*cases, *(qqq_case(7, 384, g=g, bias=g != 64) for g in (0, 64, 128))], x)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_minimums(dtype: np.dtype[Any]) -> None:
    """Beside nodes with zero points of the same bits, which have a function of their own."""
    cases = [
        abq_case(7, 384, a=a, g=g, sym=sym, bias=g > 0, minimum=minimum)
        for a, sym, g in ((8, 0, 0), (8, 1, 0), (4, 0, 24), (8, 1, 128), (16, 0, 0), (16, 0, 32))
        for minimum in (1, 0)
    ]
    check(cases, tokens(6, 384, dtype))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_norms(rank: int, dtype: np.dtype[Any]) -> None:
    """One function of a scheme serves nodes of any epsilon."""
    x = tokens(40, 384, dtype).reshape(*((40,) if rank == 2 else (2, 20)), 384)
    cases = [
        abq_case(7, 384, a=a, g=g, bias=g > 0)
        for a, g in ((8, 0), (4, 24), (8, 128), (16, 0), (16, 64))
    ]
    cases += [qqq_case(7, 384, g=g, bias=g != 64) for g in (0, 64, 128)]
    check(
        [
            (replace(attrs, norm_epsilon=epsilon), arrays)
            for epsilon in (1e-5, 1.0)
            for attrs, arrays in cases
        ],
        x,
    )
    check([(replace(attrs, norm_epsilon=1e-5), arrays) for attrs, arrays in cases], x[..., :0, :])
    bad = x.copy()
    bad[..., 1, 5], bad[..., 2, 6], bad[..., 3, :] = np.nan, np.inf, 0
    check(
        [
            (replace(attrs, norm_epsilon=1e-5), arrays)
            for attrs, arrays in cases
            if attrs.abits < 16
        ],
        bad,
    )


@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 33, 129])
def test_odd_sizes(k: int) -> None:
    cases = [
        make(n, k) for make, n in itertools.product((abq_case, qqq_case), (1, 63, 64, 65, 130))
    ]
    check(cases, tokens(3, k, F16))


@pytest.mark.parametrize(("k", "g"), [(24, 8), (99, 33), (130, 65), (192, 96)])
def test_groups_that_do_not_fill_words(k: int, g: int) -> None:
    check(
        [abq_case(6, k, a=a, sym=sym, g=g) for a, sym in ((8, 0), (8, 1), (3, 0))],
        tokens(5, k, F32),
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_extreme_finite_tokens(dtype: np.dtype[Any]) -> None:
    """Zero, -0.0, subnormal, huge, one-sided and outlier rows."""
    info = onnx.helper.tensor_dtype_to_np_dtype(ELEMENT[dtype])
    rng = np.random.default_rng(3)
    x = tokens(9, 192, dtype)
    x[0, 5] = 6e4
    x[1] = 0
    x[2] = -0.0
    x[3] = np.array(1, f"u{info.itemsize}").view(dtype) * rng.integers(-3, 4, 192).astype(
        dtype
    )  # smallest subnormals
    x[4] = np.abs(x[4]) + np.asarray(1, dtype)
    x[5] = -x[4]
    x[6] = {F16: 65504.0, BF16: 1.5e38, F32: 1.5e38}[dtype] * rng.choice([-1, 1], 192)
    x[7] = 2.0**-14 * rng.normal(0, 2, 192)
    x[8, 1:] = 0
    check(both_ops(), x)


def test_ties_are_rounded_as_in_the_reference() -> None:
    """x * (1 / scale) and x / scale differ in their last bit, which decides near halves: no fusion
    may swap them.
    """
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2, (500, 1)).astype(np.float32)
    x = (np.arange(-63, 64) + 0.5).astype(np.float32) * scale
    x[:, 0] = 127 * scale[:, 0]
    attrs = qqq(127, 127)
    arrays = QuantArrays(
        np.eye(127, dtype=np.int8), np.ones((127, 1), np.float32)
    )  # the output shows every code
    symmetric = abq(127, 127, sym=1, w=(1, 2))
    codes = QuantArrays(
        np.eye(127, dtype=np.uint8), np.ones((127, 1), np.float32), np.zeros((127, 1), np.int32)
    )
    quotient = np.rint(x / scale)
    product = (
        check(
            [(attrs, arrays), (symmetric, codes), (replace(symmetric, act_symmetric=0), codes)], x
        )[0]
        / scale
    )
    assert (np.rint(product) != quotient).sum() > 100  # the two ways do differ here


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_bad_rows_are_nan_and_alone(dtype: np.dtype[Any], bad: float) -> None:
    for column in (0, 77, 191):
        x = tokens(5, 192, dtype)
        x[1, column] = x[4, 191 - column] = bad
        for y in check(both_ops(), x):
            assert np.isnan(y).all(axis=1).tolist() == [False, True, False, False, True]
            assert np.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_trap_25_output_saturates(dtype: np.dtype[Any]) -> None:
    largest = {F16: 65504.0, BF16: float.fromhex("0x1.fep127")}[dtype]
    sign = np.where(np.arange(6) % 2, -1, 1).astype(np.float32)
    cases = [
        (replace(attrs, has_bias=1), replace(arrays, bias=sign * np.float32(3.4e38)))
        for attrs, arrays in [*both_ops(), abq_case(6, 192, a=16)]
    ]
    for y in check(cases, tokens(2, 192, F32).astype(dtype)):
        np.testing.assert_array_equal(y, np.tile(sign * np.float32(largest), (2, 1)))


def test_no_tokens() -> None:
    cases = [*both_ops(), abq_case(6, 192, a=16)]
    for shape in ((0, 192), (0, 3, 192), (2, 0, 192)):
        assert {y.shape for y in check(cases, np.zeros(shape, F16))} == {(*shape[:-1], 6)}


def test_zero_points_far_outside_the_code_range() -> None:
    attrs, arrays = abq_case(5, 100, g=50)
    zero = np.array(
        [[-(2**31), 2**31 - 1], [-10_000, 10_000], [-1, 16], [0, 15], [255, -255]], np.int32
    )
    flat = replace(arrays, zero=zero[:, :1], scale=arrays.scale[:, :1])
    check(
        [(attrs, replace(arrays, zero=zero)), (replace(attrs, group_size=0), flat)],
        tokens(4, 100, F32),
    )


def test_largest_sums() -> None:
    """Every code at its limit, where uint8 x int8 kernels saturate and fp32 sums are no longer
    exact.
    """
    k = 4096
    one = np.ones((2, 1), np.float32)
    codes = np.stack([np.full(k, 255, np.uint8), np.tile(np.array([254, 255], np.uint8), k // 2)])
    wide = QuantArrays(codes, one, np.array([[0], [255]], np.int32))
    narrow = QuantArrays(
        np.stack([np.full(k, 7, np.int8), np.full(k, -8, np.int8)]),
        one,
        scale_group=np.full((2, k // 128), 30, np.float16),
    )
    x = np.stack([np.full(k, -3), np.full(k, 7), np.resize([-3, 7], k)]).astype(F32)
    check(
        [
            (abq(2, k, w=(8, 256)), wide),
            (abq(2, k, w=(8, 256), sym=1), wide),
            (qqq(2, k, g=128), narrow),
        ],
        x,
    )


def test_model_passes_the_checker() -> None:
    cases = [*both_ops(), abq_case(6, 192, a=16, bias=1)]
    cases += [(replace(attrs, norm_epsilon=1e-5), arrays) for attrs, arrays in cases]
    onnx.checker.check_model(model_of(cases, F16, 3), full_check=True)


def test_layers_of_one_scheme_share_a_function_whatever_their_sizes() -> None:
    factory = NodeFactory(TensorProto.FLOAT16)
    names = ["X", "w", "s", "z"]
    sizes = [(5, 64, 8), (7, 96, 8), (9, 64, 32)]
    nodes = [factory.gemm("ABQGemm", abq(n, k, g=g), f"layer{n}", names, "Y") for n, k, g in sizes]
    assert len(factory.functions()) == 1
    assert [(node.domain, node.op_type, node.overload, node.name) for node in nodes] == [
        ("anybit", "ABQGemm", "", "layer5"),
        ("anybit", "ABQGemm", "", "layer7"),
        ("anybit", "ABQGemm", "", "layer9"),
    ]
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
    sizes_and_scheme = {
        "wbits": 4,
        "levels": 16,
        "abits": 8,
        "act_symmetric": 0,
        "group_size": 8,
        "in_features": 64,
    }
    extra = {
        "out_features": 5,
        "has_bias": 0,
        "norm_epsilon": 0.0,
        "plugin_namespace": b"anybit",
        "plugin_version": b"1",
    }
    assert attributes == {**sizes_and_scheme, **extra}


def test_domains_are_numbered_per_op_in_order_of_first_use() -> None:
    factory = NodeFactory(TensorProto.FLOAT16)
    variants = [
        ("ABQGemm", abq(8, 64)),
        ("QQQGemm", qqq(8, 64)),
        ("ABQGemm", abq(8, 64, g=8)),
        ("QQQGemm", qqq(8, 64, bias=1)),
        ("ABQGemm", abq(8, 64, a=4)),
        ("ABQGemm", abq(8, 64, g=16)),
        ("QQQGemm", replace(qqq(8, 64), norm_epsilon=1e-5)),
        ("QQQGemm", replace(qqq(8, 128), norm_epsilon=1e-6)),
    ]
    domains = []
    for op, attrs in variants:
        names = op_spec(op).input_names(attrs)
        domains.append(factory.gemm(op, attrs, "layer", names, "Y").domain)
    assert domains == [
        "anybit",
        "anybit",
        "anybit.v1",
        "anybit.v1",
        "anybit.v2",
        "anybit.v1",
        "anybit.v2",
        "anybit.v2",
    ]
    assert [(f.name, f.domain) for f in factory.functions()] == [
        ("ABQGemm", "anybit"),
        ("QQQGemm", "anybit"),
        ("ABQGemm", "anybit.v1"),
        ("QQQGemm", "anybit.v1"),
        ("ABQGemm", "anybit.v2"),
        ("QQQGemm", "anybit.v2"),
    ]
    imports = {item.domain: item.version for item in factory.opset_imports(23)}
    assert imports == {"": 23, "anybit": 1, "anybit.v1": 1, "anybit.v2": 1}


def test_bytes_are_deterministic() -> None:
    first, second = (
        model_of(both_ops(), F16).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_factory_refuses_what_the_op_refuses() -> None:
    with pytest.raises(InputError) as error:
        NodeFactory(TensorProto.FLOAT16).gemm(
            "QQQGemm", qqq(8, 64, g=32), "model.layers.0.o_proj", ["X", "w", "s", "g"], "Y"
        )
    assert (
        str(error.value)
        == "model.layers.0.o_proj: got group size 32, expected 0, 64 or 128. Use one of these, "
        "or --method abq."
    )


def test_factory_refuses_a_wrong_number_of_inputs() -> None:
    with pytest.raises(ValueError) as error:
        NodeFactory(TensorProto.FLOAT16).gemm("ABQGemm", abq(8, 64), "layer", ["X", "w", "s"], "Y")
    assert str(error.value) == "layer: got 3 inputs, ABQGemm takes X, weight, scale, zero"


@pytest.mark.parametrize(
    "case",
    [
        abq_case(33, 96),
        abq_case(33, 96, g=32),
        abq_case(33, 96, a=16),
        qqq_case(33, 96),
        qqq_case(33, 128, g=64),
    ],
    ids=["abq", "abq-g32", "abq-a16", "qqq", "qqq-g64"],
)
def test_weights_are_unpacked_at_load(case: Case, tmp_path: Path) -> None:
    """What runs for a token is a few dozen ops on activations; nothing is left of shifts and masks."""
    session_of(model_of([case], F16), tmp_path / "optimised.onnx")
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    kinds = {node.op_type for node in nodes}
    assert not kinds & {
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Slice",
        "ABQGemm",
        "QQQGemm",
    }
    assert kinds & {"MatMulInteger", "MatMul", "Scan"}
    assert len(nodes) <= 60


@pytest.mark.parametrize(
    "second",
    [abq_case(9, 128), abq_case(9, 128, bias=1), abq_case(9, 128, g=32), qqq_case(9, 128, g=64)],
    ids=["same", "bias", "g32", "qqq"],
)
def test_graphsurgeon_round_trip_keeps_a_model_of_several_schemes(second: Case) -> None:
    import onnx_graphsurgeon as gs

    model = model_of([abq_case(9, 128), second, abq_case(7, 128)], F16, 3)
    again = gs.export_onnx(gs.import_onnx(model))
    x = tokens(6, 128, F32).reshape(2, 3, -1)
    for got, want in zip(
        session_of(again).run(None, {"X32": x}),
        session_of(model).run(None, {"X32": x}),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
