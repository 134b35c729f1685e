"""Honest exports pass at every bit width; what could not be run is noted; engines, memory, text and
progress.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.out.files import file_records, write_json
from calibration.out.manifest import read_manifest
from calibration.progress import NullProgress
from exporter.proof.options import ValidateOptions
from exporter.proof.validate import validate
from plugins.errors import InputError

pytestmark = pytest.mark.slow  # half a minute as a whole

HONEST: dict[str, dict[str, Any]] = {
    "qqq": {"op": "QQQGemm"},
    "qqq-g64": {"op": "QQQGemm", "group_size": 64},
    "w8a8": {"wbits": 8},
    "w6a6": {"wbits": 6, "abits": 6},
    "w4a4": {"abits": 4},
    "w3a8": {"wbits": 3},
    "w2ba8": {"wbits": 2, "balanced": True},
    "w4a16-g32": {"abits": 16, "group_size": 32},
    "w4a8-g16 with minimums": {"group_size": 16, "has_minimum": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"wbits": 8, "dtype": "float32"},
    "bfloat16-a16": {"abits": 16, "dtype": "bfloat16"},
    "kv4": {"kv_bits": 4},
    "kv2-bfloat16": {"wbits": 8, "kv_bits": 2, "dtype": "bfloat16"},
    "kv8-float32": {"abits": 16, "kv_bits": 8, "dtype": "float32"},
    "norms-apart": {"fuse_norms": False},
    "norms-apart-bfloat16": {"op": "QQQGemm", "dtype": "bfloat16", "fuse_norms": False},
    "mixed": {
        "op": "QQQGemm",
        "rules": (
            "down_proj w8a8",
            "layers.0.mlp.gate_up_proj w2ba8-g16",
            "layers.1.self_attn.* w4a16",
        ),
    },
    "mixed-abq": {
        "rules": ("layers.0.* w8a6-g32", "o_proj w3a4", "layers.1.mlp.* w1ba8"),
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_exports_pass(
    tiny_export: Callable[..., Path], tiny_model_dir: Path, name: str
) -> None:
    result = validate(
        tiny_export(**HONEST[name]), ValidateOptions(tokens=24, steps=3, model=str(tiny_model_dir))
    )
    assert result.ok, result.first_failure
    tensors = ["model.layers.0.output", "model.layers.1.output", "logits"]
    phases = ("prefill", "decode", "padded batch")
    weights = [row for row in result.rows if row.level == "weights"]
    assert result.rows[: len(weights)] == tuple(weights) and len(weights) == 21
    rows = result.rows[len(weights) :]
    shown = [f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [(row.level, row.phase, row.tensor) for row in rows] == [
        (level, phase, tensor)
        for level in ("export", "native", "as run", "quantisation")
        for phase in phases
        for tensor in ([*shown, "logits"] if level == "as run" else tensors)
    ]
    for row in rows:
        assert (
            row.cosine is not None
            and -1 <= row.cosine <= 1
            and row.relative is not None
            and row.relative >= 0
        )
        assert (row.agreement is not None) is (row.tensor == "logits")
        inside = (
            row.level == "export"
            or (row.level == "native" and row.tensor != "logits")
            or (row.level == "as run" and not row.tensor.endswith("key"))
        )
        assert bool(row.operator) is inside
    assert result.notes == ("No engine was built, so the CUDA kernels were not run.",)
    json.dumps(result.as_dict(), allow_nan=False)


LOST = "so neither the weights nor the quantisation error were checked."


def test_missing_float_model_is_a_note(tiny_export: Callable[..., Path]) -> None:
    for model, note in (
        (None, f"No float model was given, {LOST}"),
        ("nobody/knows", f"The float model could not be opened, {LOST} model nobody/knows: got "),
    ):
        result = validate(tiny_export(), ValidateOptions(tokens=8, steps=0, model=model))
        assert (
            result.ok
            and {row.level for row in result.rows} == {"export", "native", "as run"}
            and result.notes[0].startswith(note)
        )


def test_another_float_model_is_a_note(
    tiny_export: Callable[..., Path], tiny_llama: Callable[..., Path]
) -> None:
    other = tiny_llama(rms_norm_eps=1e-6)
    result = validate(tiny_export(), ValidateOptions(tokens=8, steps=0, model=str(other)))
    assert (
        result.notes[0] == f"The float model at {other} is not the one that was quantised, {LOST}"
    )


def test_an_engine_without_a_gpu_is_a_note(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: [])
    shutil.copytree(tiny_export(), tmp_path / "out")
    with_engine(tmp_path / "out")
    result = validate(tmp_path / "out", ValidateOptions(tokens=8, steps=0))
    assert (
        result.notes[1]
        == "No GPU here: the engine was built but not run, so the CUDA kernels were not "
        "executed in this validation."
    )


def with_engine(out: Path, listed: bool = True) -> None:
    """Put an (empty) engine into OUT, in the manifest or left from an earlier export."""
    folder, manifest = out / "engine", read_manifest(out / "manifest.json")
    folder.mkdir()
    (folder / "model.engine").write_bytes(b"")
    shutil.copy(out / "onnx" / "model.json", folder)
    if listed:
        record = {"fingerprint": "", "seconds": 1, "peak_rss": 1, "files": file_records(folder)}
        manifest["stages"]["engine"] = record
        write_json(out / "manifest.json", manifest)


def test_an_earlier_exports_engine_is_not_run(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: ["9.0"])
    out = tmp_path / "out"
    shutil.copytree(tiny_export(), out)
    with_engine(out, listed=False)
    result = validate(out, ValidateOptions(tokens=8, steps=0))
    assert result.notes[1] == (
        f"No engine was built, so the CUDA kernels were not run; {out / 'engine'} holds an "
        f"earlier export's."
    )
    assert {row.level for row in result.rows} == {"export", "native", "as run"}


def flip_a_norm(folder: Path, factor: float = -1) -> None:
    """Change the sign, or what else a factor does, of some norm weights in the data file."""
    tensor = next(
        item
        for item in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
        if item.name == "model.layers.1.post_attention_layernorm.weight"
    )
    offset = next(int(item.value) for item in tensor.external_data if item.key == "offset")
    array = np.memmap(folder / "model.onnx.data", np.float16, "r+", offset, tuple(tensor.dims))
    array[4:12] *= np.float16(factor)
    array.flush()


def test_an_engine_with_a_gpu_is_compared(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime with a wrong weight plays the engine."""
    from exporter.run.onnxruntime import OnnxSession

    bad = tmp_path / "bad"
    shutil.copytree(tiny_export(), bad)
    flip_a_norm(bad / "onnx")
    with_engine(bad)
    good = tmp_path / "good"
    shutil.copytree(bad, good)
    shutil.copytree(tiny_export() / "onnx", good / "onnx", dirs_exist_ok=True)
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: ["9.0"])
    for onnx_folder, ok in ((tiny_export() / "onnx", True), (bad / "onnx", False)):
        monkeypatch.setattr(
            "exporter.run.tensorrt.TensorrtRunner.open",
            lambda runner, stage, description, where=onnx_folder: OnnxSession(
                where, description.max_context
            ),
        )
        result = validate(good, ValidateOptions(tokens=24, steps=1))
        assert result.ok is ok and len(result.notes) == 1  # no float model
        kernel = [
            row.tensor for row in result.rows if (row.level, row.phase) == ("kernel", "prefill")
        ]
        assert kernel == [
            "present.0.key",
            "present.0.value",
            "present.1.key",
            "present.1.value",
            "logits",
        ]
    assert result.first_failure.startswith("got an accumulated relative error of ")
    assert (
        "at logits (kernel, prefill: the TensorRT engine against ONNX Runtime), expected at most "
        in result.first_failure
    )


@pytest.mark.parametrize("content", [b"Too short.", b"not UTF-8: \xff" + b" word" * 40])
def test_a_text_that_calibration_takes_is_repeated(
    tiny_export: Callable[..., Path], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "short.txt").write_bytes(content)
    result = validate(
        tiny_export(), ValidateOptions(calib=str(tmp_path / "short.txt"), tokens=16, steps=1)
    )
    assert result.ok and result.rows


def test_too_little_memory(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.proof.memory.usable_memory", lambda: 100 * 1024)
    with pytest.raises(InputError) as caught:
        validate(tiny_export())
    assert str(caught.value) == (
        "validation: got 0.00 GB of free memory, expected 0.51 GB for 0 M weights. "
        "Use --until engine here, and validate on a machine with more memory."
    )


@pytest.mark.parametrize("with_float, total", [(True, 21 + 4 * 6), (False, 4 * 5)])
def test_progress_reaches_its_total(
    tiny_export: Callable[..., Path], tiny_model_dir: Path, with_float: bool, total: int
) -> None:
    class Counter(NullProgress):
        total = done = 0

        def start(self, stage: str, total: int) -> None:
            self.total = total

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps

    counter: Any = Counter()
    validate(
        tiny_export(),
        ValidateOptions(tokens=8, steps=1, model=str(tiny_model_dir) if with_float else None),
        counter,
    )
    assert counter.done == counter.total == total


def test_rotation_is_no_quantisation_error(
    run: Callable[..., tuple[int, str, str]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Calibration rotates the residual stream and the values; the float model is compared in the
    same coordinates.
    """
    out = tmp_path / "out"
    code, _, error = run(
        out,
        "--method",
        "abq",
        "--wbits",
        "8",
        "--abits",
        "8",
        "--nsamples",
        "2",
        "--seqlen",
        "32",
        "--dtype",
        "float32",
    )
    assert code == 0, error
    assert (
        json.loads((out / "quant" / "quant.json").read_text())["calibration"]["settings"][
            "switches"
        ]["rotation"]
        == "hadamard"
    )
    result = validate(out, ValidateOptions(tokens=24, steps=2, model=str(tiny_model_dir)))
    errors = [row.relative for row in result.rows if row.level == "quantisation"]
    assert result.ok and len(errors) >= 9
    assert max(error for error in errors if error is not None) < 0.05
