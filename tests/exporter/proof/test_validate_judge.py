"""Verdicts: which operator is named, in which order, and what counts as a failure."""

from __future__ import annotations

import numpy as np

from calibration.quant.scheme import QuantScheme
from exporter.proof.judge import LayerReport, Stack, first_failure, judge
from exporter.proof.metrics import TensorError, tensor_error
from exporter.proof.runners import GemmNode
from tests.calibration.llama import llama

DECODER = llama(2)
NODES = [GemmNode(name, f"{name}.in", f"{name}.out", site) for name, site in DECODER.sites.items()]
STACK = Stack(DECODER, NODES, QuantScheme("ABQGemm", "rtn", 8, 8))


def test_a_limit_follows_from_the_coarsest_bits_so_far() -> None:
    def limit(abits: int, level: str, tensor: str) -> float | None:
        late = Stack(
            DECODER,
            NODES,
            STACK.scheme,
            {"model.layers.1.mlp.down_proj": QuantScheme("ABQGemm", "rtn", 8, abits)},
        )
        return late.limit(level, tensor)

    for level in ("export", "quantisation"):
        for tensor in ("model.layers.0.output", "present.0.key"):
            assert limit(4, level, tensor) == STACK.limit(level, tensor) is not None
        for tensor in ("model.layers.1.output", "present.1.value", "logits"):
            coarse, fine = limit(7, level, tensor), STACK.limit(level, tensor)
            assert coarse is not None and fine is not None and coarse > fine
        assert limit(16, level, "logits") == STACK.limit(
            level, "logits"
        )  # one node of eight without noise changes nothing


def error(size: float) -> TensorError:
    reference = np.random.default_rng(0).standard_normal((1, 4, 16))
    return tensor_error(reference, reference * (1 + size), np.ones((1, 4), bool))


def measured(**wrong: float) -> dict[tuple[str, str, str], TensorError]:
    """All small but for {"level phase tensor": relative error}."""
    errors = {}
    for phase in ("prefill", "decode"):
        for tensor in ("model.layers.0.output", "model.layers.1.output", "logits"):
            errors["export", phase, tensor] = error(1e-3)
            errors["quantisation", phase, tensor] = error(1e-2)
        for index in range(3):
            for operator in STACK.operators(index):
                errors["operator", phase, operator.tensor] = error(1e-4)
    for key, size in wrong.items():
        level, phase, tensor = key.split(" ")
        errors[level, phase, tensor] = error(size)
    return errors


def verdict(**wrong: float) -> str:
    errors = measured(**wrong)
    return first_failure(errors, judge(errors, STACK), STACK)


def test_execution_order_of_a_layer() -> None:
    assert [operator.tensor for operator in STACK.operators(0)] == [
        "model.layers.0.self_attn.qkv_proj.in",
        "model.layers.0.self_attn.qkv_proj.out",
        "present.0.key",
        "present.0.value",
        "model.layers.0.self_attn.o_proj.in",
        "model.layers.0.self_attn.o_proj.out",
        "model.layers.0.mlp.gate_up_proj.in",
        "model.layers.0.mlp.gate_up_proj.out",
        "model.layers.0.mlp.down_proj.in",
        "model.layers.0.mlp.down_proj.out",
        "model.layers.0.output",
    ]
    assert [operator.kind for operator in STACK.operators(0)][4] == "attention"
    assert [operator.name for operator in STACK.operators(2)] == ["lm_head"]


def test_all_small_passes() -> None:
    assert verdict() == ""


def test_the_earliest_operator_is_named() -> None:
    text = verdict(
        **{
            "operator prefill model.layers.1.mlp.down_proj.out": 0.5,
            "operator prefill model.layers.1.self_attn.o_proj.out": 0.2,
            "operator decode model.layers.0.self_attn.qkv_proj.out": 0.9,
            "export prefill logits": 0.9,
        }
    )
    assert text == (
        "got a relative error of 0.2 in output channel 0 at model.layers.1.self_attn.o_proj "
        "given its inputs (export, prefill: "
        "ONNX Runtime against the fake-quantised torch reference), expected at most 0.00099"
    )


def test_accumulated_errors_are_named_by_level() -> None:
    assert verdict(**{"export decode model.layers.1.output": 0.3}) == (
        "got an accumulated relative error of 0.3 at model.layers.1.output (export, decode: "
        "ONNX Runtime against the fake-quantised torch "
        "reference), expected at most 0.099"
    )
    assert verdict(**{"quantisation prefill model.layers.0.output": 0.8}) == (
        "got an accumulated relative error of 0.8 at model.layers.0.output (quantisation, "
        "prefill: the fake-quantised torch reference "
        "against the float model), expected at most 0.2"
    )


def test_nan_is_a_failure_even_without_a_limit() -> None:
    row = LayerReport("export", "prefill", "logits", None, None, None, None, None)
    assert not row.ok
    assert LayerReport("export", "prefill", "logits", 1.0, 9.0, 1.0, 0.9, None).ok
    assert verdict(**{"quantisation decode logits": float("nan")}).startswith(
        "got an accumulated relative error of NaN or Inf at logits ("
    )


def test_rows_hold_the_worst_operator() -> None:
    errors = measured(**{"operator decode model.layers.1.mlp.down_proj.in": 3e-3})
    rows = [row for row in judge(errors, STACK) if (row.level, row.phase) == ("export", "decode")]
    assert [row.operator for row in rows][1:] == ["model.layers.1.mlp.down_proj.in", "lm_head"]
    assert (
        rows[1].operator_error is not None
        and abs(rows[1].operator_error - 3e-3) < 1e-9
        and rows[1].ok
    )
    assert [row.agreement for row in rows] == [None, None, 1.0]
