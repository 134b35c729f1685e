"""The native kernels against the function bodies: the same bits, or the node is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.proof import onnx_levels
from exporter.proof.judge import Stack
from exporter.proof.options import ValidateOptions
from exporter.proof.validate import validate
from exporter.run.onnxruntime import OnnxSession
from plugins.errors import UserError
from tests.exporter.planted import change_tensor

BRIEF = ValidateOptions(tokens=12, steps=2)


@pytest.mark.parametrize(
    "scheme",
    [
        {"op": "QQQGemm", "act_symmetric": True},
        {"wbits": 2, "balanced": True, "abits": 5, "group_size": 16},
        {"abits": 8, "kv_bits": 4, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_integers_make_the_same_bits(
    tiny_export: Callable[..., Path], scheme: dict[str, Any]
) -> None:
    result = validate(tiny_export(**scheme), BRIEF)
    rows = [row for row in result.rows if row.level == "native"]
    assert {row.phase for row in rows} == {"prefill", "decode", "padded batch"}
    assert {(row.relative, row.limit, row.ok) for row in rows} == {(0.0, 0.0, True)}


def test_without_integers_rounding_is_allowed(tiny_export: Callable[..., Path]) -> None:
    result = validate(tiny_export(wbits=3, abits=16), BRIEF)
    rows = [row for row in result.rows if row.level == "native" and row.tensor != "logits"]
    assert result.ok and all(row.operator and row.operator_limit for row in rows)


def test_without_integers_every_kernel_is_judged(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a deep model of few bits may make of rounding: each node's inputs are given."""
    out, node = tiny_export(wbits=3, abits=16), "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(Stack, "limit", accumulated_is_free)
    monkeypatch.setattr(onnx_levels, "OnnxSession", wrong(f"{node}.output", lambda x: x * 0 + 1))
    failure = validate(out, BRIEF).first_failure
    assert re.sub(r"error of [0-9.e-]+ at", "error of ERROR at", failure) == (
        f"got a relative error of ERROR at {node} (native, prefill: the native CPU kernels against "
        "the function bodies, both in ONNX Runtime), expected at most 0.00099"
    )


def accumulated_is_free(stack: Stack, level: str, tensor: str) -> float | None:
    return None


def test_layers_before_do_not_spread(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a wrong one, let alone attention's rounding, which moves codes further on."""
    other = Path(shutil.copytree(tiny_export(abits=8), tmp_path / "out"))
    change_tensor(other, "model.layers.0.self_attn.o_proj.scale", lambda scale: scale.fill(0.1))

    class Other(OnnxSession):
        def __init__(self, folder: Path, *rest: Any, kernels: Path | None = None, **options: Any):
            mine = other / "onnx" if kernels else folder
            super().__init__(mine, *rest, kernels=kernels, **options)

    monkeypatch.setattr(onnx_levels, "OnnxSession", Other)
    found = {
        layers: validate(tiny_export(abits=8), replace(BRIEF, layers=layers, runners=("native",)))
        for layers in ((0, 1), (1, 2))
    }
    assert " at model.layers.0.self_attn.o_proj (native, " in found[0, 1].first_failure
    rows = [row for row in found[1, 2].rows if row.level == "native"]
    assert found[1, 2].ok and {row.relative for row in rows} == {0.0}


def wrong(tensor: str, change: Callable[[Any], Any]) -> type[OnnxSession]:
    """A session as if a kernel were wrong in one number."""

    class Wrong(OnnxSession):
        def step(self, *arguments: Any) -> dict[str, np.ndarray]:
            outputs = super().step(*arguments)
            if self.native:
                changed = outputs[tensor].copy()
                changed.flat[-7] = change(changed.flat[-7])
                outputs[tensor] = changed
            return outputs

        def __init__(self, *arguments: Any, kernels: Path | None = None, **options: Any) -> None:
            super().__init__(*arguments, kernels=kernels, **options)
            self.native = kernels is not None

    return Wrong


@pytest.mark.parametrize(
    ("tensor", "change", "failure"),
    [
        (
            "model.layers.1.mlp.gate_up_proj.output",
            lambda x: np.nextafter(x, x.dtype.type(9)),
            "got other numbers at model.layers.1.mlp.gate_up_proj (with post_attention_layernorm) "
            "(native, prefill: the native CPU kernels against the function bodies, both in ONNX "
            "Runtime), expected the same bits",
        ),
        (
            "model.layers.0.self_attn.context",
            lambda x: x + x.dtype.type(0.5),
            "got a relative error of ERROR at model.layers.0.self_attn.context (native, prefill: the "
            "native CPU kernels against the function bodies, both in ONNX Runtime), expected at most "
            "0.0078",
        ),
        (
            "present.1.value",
            lambda x: np.nextafter(x, x.dtype.type(9)),
            "got other numbers at present.1.value (native, prefill: the native CPU kernels against "
            "the function bodies, both in ONNX Runtime), expected the same bits",
        ),
    ],
)
def test_the_first_wrong_node_is_named(
    tiny_export: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tensor: str,
    change: Callable[[Any], Any],
    failure: str,
) -> None:
    monkeypatch.setattr(onnx_levels, "OnnxSession", wrong(tensor, change))
    result = validate(tiny_export(abits=8), BRIEF)
    assert not result.ok
    assert re.sub(r"error of [0-9.e-]+ at", "error of ERROR at", result.first_failure) == failure


@pytest.mark.parametrize(
    "fields", [{}, {"static": 32}, {"dtype": "float32", "static": 32}], ids=str
)
def test_attention_is_near_its_body(
    tiny_export: Callable[..., Path], fields: dict[str, Any]
) -> None:
    """By rounding to the model's type, and what is behind it has the same bits all the same."""
    result = validate(tiny_export(abits=8, **fields), BRIEF)
    rows = [row for row in result.rows if row.level == "native" and row.operator]
    assert {row.operator for row in rows} == {
        f"model.layers.{i}.self_attn.context" for i in range(2)
    }
    rounding = 2.0**-24 if "dtype" in fields else 2.0**-11
    errors = [row.operator_error or 0 for row in rows]
    assert 0 < max(errors) < rounding + 2e-6 and result.ok


def test_without_a_compiler_the_level_is_left_out_with_a_note(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = UserError("g++", "got no such program, expected a C++ compiler", "Install it")
    monkeypatch.setattr(onnx_levels, "native_library", lambda say: missing)
    result = validate(tiny_export(abits=8), BRIEF)
    assert result.ok and not [row for row in result.rows if row.level == "native"]
    assert (
        "The native CPU kernels could not be built, so they were not run. g++: got no such program, "
        "expected a C++ compiler. Install it."
    ) in result.notes
