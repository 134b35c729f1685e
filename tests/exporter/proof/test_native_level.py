"""The native kernels against the function bodies: the same bits, or the node is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.proof import validate as proof
from exporter.proof.validate import ValidateOptions, validate
from exporter.run.onnxruntime import OnnxSession
from plugins.errors import UserError

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
    rows = [row for row in result.rows if row.level == "native"]
    assert rows and all(row.ok and row.limit is not None and row.limit > 0 for row in rows)


def test_the_first_wrong_node_is_named(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "model.layers.1.mlp.gate_up_proj.output"

    class Wrong(OnnxSession):
        """As if a kernel had one last bit wrong."""

        def step(self, *arguments: Any) -> dict[str, np.ndarray]:
            outputs = super().step(*arguments)
            if self.native:
                changed = outputs[wrong].copy()
                changed.flat[7] = np.nextafter(changed.flat[7], changed.dtype.type(9))
                outputs[wrong] = changed
            return outputs

        def __init__(self, *arguments: Any, kernels: Path | None = None, **options: Any) -> None:
            super().__init__(*arguments, kernels=kernels, **options)
            self.native = kernels is not None

    monkeypatch.setattr(proof, "OnnxSession", Wrong)
    result = validate(tiny_export(abits=8), BRIEF)
    assert not result.ok and result.first_failure == (
        "got other numbers at model.layers.1.mlp.gate_up_proj (with post_attention_layernorm) "
        "(native, prefill: the native CPU kernels against the function bodies, both in ONNX "
        "Runtime), expected the same bits"
    )


def test_without_a_compiler_the_level_is_left_out_with_a_note(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = UserError("g++", "got no such program, expected a C++ compiler", "Install it")
    monkeypatch.setattr(proof, "native_library", lambda: missing)
    result = validate(tiny_export(abits=8), BRIEF)
    assert result.ok and not [row for row in result.rows if row.level == "native"]
    assert (
        "The native CPU kernels could not be built, so they were not run. g++: got no such program, "
        "expected a C++ compiler. Install it."
    ) in result.notes
