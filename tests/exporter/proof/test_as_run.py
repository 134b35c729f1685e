"""The session that users open against the rounded graph: what honest ones show, faults of its own that
no other level sees, roundings that it leaves out, and its loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quant.scheme import QuantScheme
from exporter.proof import onnx_levels
from exporter.proof.judge import AS_RUN, LayerReport
from exporter.proof.limits import Limits
from exporter.proof.loss import LossDifference, loss_as_run, loss_difference
from exporter.proof.options import ValidateOptions
from exporter.proof.prove import _loss
from exporter.proof.result import ValidationResult
from exporter.proof.saved import SavedResults
from exporter.proof.validate import validate
from exporter.run.native import NativeSession
from plugins.errors import CheckError
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import export

BRIEF = ValidateOptions(tokens=12, steps=1)
Change = Callable[[dict[str, np.ndarray]], None]
SCHEME = QuantScheme("ABQGemm", "rtn", 4, 8)
BETWEEN = "the ONNX file as users run it against the rounded graph"


def session(change: Change, plain: bool) -> type[NativeSession]:
    """One whose outputs are changed: those of the session as users run it, or those of the one whose
    inner tensors are shown.
    """

    class Changed(NativeSession):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.changed = plain == (not any(arguments[3:]))

        def step(self, *arguments: Any) -> dict[str, np.ndarray]:
            outputs = {name: array.copy() for name, array in super().step(*arguments).items()}
            if self.changed:
                change(outputs)
            return outputs

    return Changed


def rows_of(result: ValidationResult) -> list[Any]:
    return [row for row in result.rows if row.level == AS_RUN]


@pytest.mark.parametrize(
    "scheme",
    [
        {"dtype": "float32"},
        {"kv_bits": 4, "static": 32},
        {"op": "QQQGemm", "act_symmetric": True, "head": 8},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_honest_sessions_pass(tiny_export: Callable[..., Path], scheme: dict[str, Any]) -> None:
    result = validate(tiny_export(**scheme), BRIEF)
    assert result.ok, result.first_failure
    rows = rows_of(result)
    assert {row.phase for row in rows} == {"prefill", "decode", "padded batch"}
    tensors = [f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [row.tensor for row in rows if row.phase == "decode"] == [*tensors, "logits"]
    assert [bool(row.operator) for row in rows[:5]] == [False, True, False, True, True]
    stream = [row.limit for row in result.rows if row.level == "export"][:2]
    assert [row.limit for row in rows[:4]] == [one for one in stream for _ in range(2)]
    if "dtype" in scheme:  # which ONNX Runtime computes in fp32 as it stands
        assert "left_out" not in result.facts


def wrong_gemm(outputs: dict[str, np.ndarray]) -> None:
    outputs["model.layers.1.mlp.down_proj.output"][..., 5] *= 1.5


def lost_cache(outputs: dict[str, np.ndarray]) -> None:
    outputs["present.1.value"][:, 1] = outputs["present.1.value"][:, 0]


def other_logits(outputs: dict[str, np.ndarray]) -> None:
    outputs["logits"] = np.roll(outputs["logits"], 1, -1)


@pytest.mark.parametrize(
    ("change", "plain", "failure"),
    [
        (
            wrong_gemm,
            False,
            "got a relative error of N in output channel 5 at model.layers.1.mlp.down_proj given its "
            f"inputs (as run, prefill: {BETWEEN}), expected at most N",
        ),
        (
            lost_cache,
            True,
            "got an accumulated relative error of N at present.1.value (as run, prefill: "
            f"{BETWEEN}), expected at most N",
        ),
        (
            other_logits,
            True,
            f"got an accumulated relative error of N at logits (as run, prefill: {BETWEEN}), expected "
            "at most N",
        ),
    ],
    ids=["gemm", "cache", "logits"],
)
def test_a_fault_of_the_session_is_named(
    tiny_export: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    plain: bool,
    failure: str,
) -> None:
    """What is wrong in it alone: the file, the bodies and the kernels one by one are right."""
    monkeypatch.setattr(onnx_levels, "NativeSession", session(change, plain))
    result = validate(tiny_export(dtype="float32"), BRIEF)
    assert (
        re.sub(r"\b[0-9]\.[0-9]\S*(?= in | at |$)|\b0\.[0-9]+$", "N", result.first_failure)
        == failure
    )
    assert {row.level for row in result.rows if not row.ok} == {AS_RUN}
    assert "left_out" not in result.facts  # what is wrong is no rounding
    showing = [
        note for note in result.warnings if note.startswith("Where inner tensors are outputs")
    ]
    assert bool(showing) == (change is other_logits)


def test_roundings_that_are_left_out_are_a_warning(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a node read its input before that was rounded: the codes of some numbers are others."""
    tensor, node = "model.layers.0.mlp.product", "model.layers.0.mlp.down_proj"

    def unrounded(outputs: dict[str, np.ndarray]) -> None:
        seen = outputs[tensor]
        seen[...] = np.where(
            np.arange(seen.shape[-1]) % 2, seen, np.nextafter(seen, seen.dtype.type(9))
        )

    monkeypatch.setattr(onnx_levels, "NativeSession", session(unrounded, False))
    result = validate(tiny_export(), BRIEF)
    assert result.ok, result.first_failure
    lost = result.facts["left_out"]
    assert 0 < lost["operators"] < lost["of"] == 22
    assert lost["error"] > lost["rounding"] > 0
    assert any(
        note.startswith("ONNX Runtime leaves out roundings of the file as users run it: ")
        for note in result.warnings
    )
    (row,) = [one for one in rows_of(result) if one.phase == "prefill" and one.operator == node]
    limits = Limits(SCHEME)
    assert limits.gemm() < row.operator_error < row.operator_limit == limits.unrounded("gemm")


def test_only_fp16_may_leave_roundings_out() -> None:
    for dtype in ("float32", "bfloat16"):
        limits = Limits(replace(SCHEME, dtype=dtype))
        for kind in ("gemm", "cache", "attention", "pointwise"):
            assert limits.unrounded(kind) == limits.operator(kind)
    half = Limits(SCHEME)
    assert (
        half.unrounded("gemm") > 8 * half.gemm() and half.unrounded("pointwise") == half.pointwise()
    )


@pytest.mark.parametrize(
    ("apart", "shows", "fails"),
    [
        ([0.0] * 8, False, False),
        ([0.3, -0.3] * 50, False, False),
        ([0.02, 0.0] * 50, True, False),
        ([0.06, 0.04] * 50, True, True),
        ([-0.06, -0.04] * 50, True, True),
    ],
)
def test_a_difference_of_loss(apart: Sequence[float], shows: bool, fails: bool) -> None:
    other = np.linspace(1, 3, len(apart))
    found = loss_difference(other, other + apart)
    assert found.loss == pytest.approx(2) and found.predictions == len(apart)
    assert (found.shows, bool(found.failure)) == (shows, fails)


def test_what_is_said_of_a_loss() -> None:
    assert LossDifference(100, 2.5, 0.05, 0.01).failure == (
        "got a loss of +0.0500 nats (95 % interval +0.0400 to +0.0600, 100 predictions) by the ONNX "
        "file as users run it, expected at most 0.02 nats more or less than the rounded graph's"
    )


def test_the_loss_is_that_of_the_rounded_graph(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.progress import NullProgress

    windows = np.arange(64).reshape(2, 32)
    found = loss_as_run(tiny_export(dtype="float32"), "float32", 64, windows, NullProgress())
    assert found.predictions == 62 and 4 < found.loss < 9
    assert abs(found.difference) < 1e-4 and found.interval < 1e-4
    monkeypatch.setattr("exporter.run.native.NativeSession", session(other_logits, True))
    worse = loss_as_run(tiny_export(dtype="float32"), "float32", 64, windows, NullProgress())
    assert worse.loss == found.loss and abs(worse.difference) > 0.01


def test_a_text_that_overflows_is_a_failure(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is written all the same."""
    from calibration.progress import NullProgress

    def overflows(*arguments: Any) -> LossDifference:
        raise CheckError("window 3", "got NaN, expected numbers", "")

    monkeypatch.setattr("exporter.proof.loss.loss_as_run", overflows)
    row = LayerReport(AS_RUN, "prefill", "logits", 1.0, 90.0, 0.0, 0.0, 0.1)
    result = ValidationResult((row,), "", ())
    found = _loss(tiny_export(), result, BRIEF, NullProgress(), SavedResults())
    assert found.first_failure == "loss as run, window 3: got NaN, expected numbers"


@pytest.mark.slow
def test_experts_are_judged_by_their_operators(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session chooses its experts itself, so what adds up has no limit; every operator has."""
    model = tiny_llama(architecture="Mixtral", **FAMILIES["Mixtral"])
    out = export(model, SCHEME, tmp_path).parent
    result = validate(out, BRIEF)
    assert result.ok, result.first_failure
    assert {row.limit for row in rows_of(result)} == {None}
    last = [row for row in rows_of(result) if row.tensor.endswith(("value", "logits"))]
    assert len(last) == 3 * 3 and all(row.operator and row.judged for row in last)
    assert any("the session as users run it" in note for note in result.notes)

    def wrong_expert(outputs: dict[str, np.ndarray]) -> None:
        (name,) = [one for one in outputs if "layers.1" in one and one.endswith("2.w2.output")]
        outputs[name][..., 3] *= 2

    monkeypatch.setattr(onnx_levels, "NativeSession", session(wrong_expert, False))
    failure = validate(out, BRIEF).first_failure
    assert "at model.layers.1.block_sparse_moe.experts.2.w2 given its inputs (as run" in failure
