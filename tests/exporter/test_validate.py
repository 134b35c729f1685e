"""Honest exports pass at every bit width; a planted fault is found at its own operator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.artifact import write_json
from calibration.progress import NullProgress
from exporter.validate import ValidateOptions, ValidationResult, validate
from plugins.core.errors import InputError

OPTIONS = ValidateOptions(tokens=24, steps=3)
HONEST: dict[str, dict[str, Any]] = {
    "qqq": {"op": "QQQGemm"}, "qqq-g64": {"op": "QQQGemm", "group_size": 64}, "w8a8": {"wbits": 8}, "w6a6": {"wbits": 6, "abits": 6},
    "w4a4": {"abits": 4}, "w3a8": {"wbits": 3}, "w2ba8": {"wbits": 2, "balanced": True}, "w4a16-g32": {"abits": 16, "group_size": 32},
    "bfloat16": {"dtype": "bfloat16"}, "float32": {"wbits": 8, "dtype": "float32"},
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_exports_pass(tiny_export: Callable[..., Path], name: str) -> None:
    result = validate(tiny_export(**HONEST[name]), OPTIONS)
    assert result.ok, result.first_failure
    tensors = ["model.layers.0.output", "model.layers.1.output", "logits"]
    phases = ("prefill", "decode", "padded batch")
    assert [(row.level, row.phase, row.tensor) for row in result.rows] == [
        (level, phase, tensor) for level in ("export", "quantisation") for phase in phases for tensor in tensors]
    for row in result.rows:
        assert row.cosine is not None and -1 <= row.cosine <= 1 and row.relative is not None and row.relative > 0
        assert (row.agreement is not None) is (row.tensor == "logits") and bool(row.operator) is (row.level == "export")
    assert result.notes == ("No engine was built, so the CUDA kernels were not run.",)
    json.dumps(result.as_dict(), allow_nan=False)


Fault = Callable[[onnx.ModelProto, Path], None]


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model: onnx.ModelProto, data: Path, name: str, index: int, make: Callable[[Any], Any]) -> None:
    """Change one element of a tensor in the data file."""
    tensor = initializer(model, name)
    offset = next(int(item.value) for item in tensor.external_data if item.key == "offset")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.memmap(data, dtype, "r+", offset, tuple(tensor.dims)).reshape(-1)
    array[index] = make(array[index])
    array.flush()


def wrong_scale(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.self_attn.o_proj.scale", 7, lambda value: value * 1.5)


def nan_scale(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.mlp.down_proj.scale", 3, lambda value: np.nan)


def lost_zero_point(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.0.mlp.down_proj.zero", 5, lambda value: 0)


def one_flipped_weight_bit(model: onnx.ModelProto, data: Path) -> None:
    # The last plane holds the most significant bit; the first word of row 0 of that plane, one weight.
    planes, rows, words = initializer(model, "model.layers.0.self_attn.qkv_proj.weight").dims
    change(model, data, "model.layers.0.self_attn.qkv_proj.weight", (planes - 1) * rows * words, lambda value: value ^ 1)


def swapped_initializers(model: onnx.ModelProto, data: Path) -> None:
    pair = [initializer(model, f"model.layers.{i}.mlp.gate_up_proj.weight") for i in range(2)]
    pair[0].name, pair[1].name = pair[1].name, pair[0].name


def wrong_norm(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.post_attention_layernorm.weight", 4, lambda value: -value)


def swapped_gate_and_up(model: onnx.ModelProto, data: Path) -> None:
    node = next(node for node in model.graph.node if node.name == "model.layers.1.mlp.gate_up_proj.output.split")
    node.output[:] = list(node.output)[::-1]


def wrong_rotation(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "rope.cos", 10 * 8 + 2, lambda value: -value)  # position 10, one frequency


def lost_past(model: onnx.ModelProto, data: Path) -> None:
    node = next(node for node in model.graph.node if node.output[0] == "model.layers.1.self_attn.context_heads")
    node.input[2] = "present.0.value"


FAULTS: dict[str, tuple[Fault, str]] = {
    "scale": (wrong_scale, "in output channel 7 at model.layers.1.self_attn.o_proj given its inputs (export, prefill: "),
    "nan": (nan_scale, "relative error of inf at model.layers.1.mlp.down_proj given its inputs (export, prefill: "),
    "zero point": (lost_zero_point, "in output channel 5 at model.layers.0.mlp.down_proj given its inputs (export, prefill: "),
    "weight bit": (one_flipped_weight_bit, "in output channel 0 at model.layers.0.self_attn.qkv_proj given its inputs (export, prefill: "),
    "swap": (swapped_initializers, " at model.layers.0.mlp.gate_up_proj given its inputs (export, prefill: "),
    "norm": (wrong_norm, " at model.layers.1.post_attention_layernorm given its inputs (export, prefill: "),
    "gate and up": (swapped_gate_and_up, " at model.layers.1.mlp.product given its inputs (export, prefill: "),
    "rope": (wrong_rotation, " at present.0.key given its inputs (export, prefill: "),
    "values": (lost_past, " at model.layers.1.self_attn.context given its inputs (export, prefill: "),
}


@pytest.mark.parametrize("name, abits", [*((name, 8) for name in FAULTS), ("weight bit", 4), ("scale", 4)])
def test_a_fault_is_found_where_it_is(tiny_export: Callable[..., Path], tmp_path: Path, name: str, abits: int) -> None:
    plant, expected = FAULTS[name]
    result = validate_with(tiny_export(abits=abits), tmp_path / "out", plant)
    assert not result.ok and expected in result.first_failure, result.first_failure
    assert result.first_failure.startswith("got a relative error of ")
    layer = next((part for part in expected.split(".") if part.isdigit()), "")
    first_bad = next(row for row in result.rows if not row.ok)
    assert (first_bad.level, first_bad.phase, first_bad.tensor) == ("export", "prefill", f"model.layers.{layer}.output")


def validate_with(whole: Path, out: Path, plant: Fault) -> ValidationResult:
    """Validate a copy of an export with a fault in it, prefill only."""
    shutil.copytree(whole, out)
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    plant(model, out / "onnx" / "model.onnx.data")
    path.write_bytes(model.SerializeToString())
    (out / "manifest.json").unlink()  # no float model: quicker
    write_json(out / "manifest.json", {"request": {"model": "nobody/knows"}})
    return validate(out, ValidateOptions(tokens=24, steps=0))


def test_missing_float_model_is_a_note(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    result = validate_with(tiny_export(), tmp_path / "out", lambda model, data: None)
    assert result.ok and {row.level for row in result.rows} == {"export"}
    assert result.notes[1].startswith("The float model could not be opened, so the quantisation error was not measured. "
                                      "model nobody/knows: got ")


def test_another_float_model_is_a_note(tiny_export: Callable[..., Path], tiny_llama: Callable[..., Path]) -> None:
    other = tiny_llama(rms_norm_eps=1e-6)
    result = validate(tiny_export(), ValidateOptions(tokens=8, steps=0, model=str(other)))
    assert result.notes[1] == f"The float model at {other} is not the one that was quantised, so the quantisation error was not measured."


def test_an_engine_without_a_gpu_is_a_note(tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.validate.gpu_capabilities", lambda: [])
    whole = tmp_path / "whole"
    shutil.copytree(tiny_export(), whole)
    (whole / "engine").mkdir()
    (whole / "engine" / "model.engine").write_bytes(b"")
    result = validate_with(whole, tmp_path / "out", lambda model, data: None)
    assert result.notes[0] == "No GPU here: the engine was built but not run, so the CUDA kernels were not executed in this validation."


def test_an_engine_with_a_gpu_is_compared(tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime with a wrong weight plays the engine."""
    from exporter.sessions import OnnxSession

    bad = tmp_path / "bad"
    validate_with(tiny_export(), bad, wrong_norm)
    (bad / "engine").mkdir()
    (bad / "engine" / "model.engine").write_bytes(b"")
    good = tmp_path / "good"
    shutil.copytree(bad, good)
    shutil.copytree(tiny_export() / "onnx", good / "onnx", dirs_exist_ok=True)
    monkeypatch.setattr("exporter.validate.gpu_capabilities", lambda: ["9.0"])
    for onnx_folder, ok in ((tiny_export() / "onnx", True), (bad / "onnx", False)):
        monkeypatch.setattr("exporter.validate.TensorrtSession", lambda folder, config, where=onnx_folder: OnnxSession(where, config))
        result = validate(good, ValidateOptions(tokens=24, steps=1))
        assert result.ok is ok and not any("engine" in note for note in result.notes)
        kernel = [row.tensor for row in result.rows if (row.level, row.phase) == ("kernel", "prefill")]
        assert kernel == ["present.0.key", "present.0.value", "present.1.key", "present.1.value", "logits"]
    assert result.first_failure.startswith("got an accumulated relative error of ")
    assert "at logits (kernel, prefill: the TensorRT engine against ONNX Runtime), expected at most " in result.first_failure


def test_too_short_text(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(InputError) as caught:
        validate(tiny_export(), ValidateOptions(calib=str(tmp_path / "short.txt")))
    assert caught.value.where == "--calib" and "expected at least 192" in caught.value.problem


def test_too_little_memory(tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal: 9 kB\nMemAvailable: 100 kB\n"
    monkeypatch.setattr("exporter.validate._meminfo", lambda: text)
    with pytest.raises(InputError) as caught:
        validate(tiny_export())
    assert str(caught.value) == ("validation: got 0.00 GB of free memory, expected 0.00 GB for the fp32 reference. "
                                 "Use --until engine here, and validate on a machine with more memory.")


def test_progress_reaches_its_total(tiny_export: Callable[..., Path]) -> None:
    class Counter(NullProgress):
        total = done = 0

        def start(self, stage: str, total: int) -> None:
            self.total = total

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps

    counter: Any = Counter()
    validate(tiny_export(), ValidateOptions(tokens=8, steps=1), counter)
    assert counter.done == counter.total == 8
