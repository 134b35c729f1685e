"""The ONNX file with native kernels: the numbers of the function bodies, where it can run, what it
says where it cannot.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.run import native
from exporter.run.model import choose_runner, find_model, open_session
from exporter.run.onnxruntime import OnnxSession
from plugins.core.op_spec import is_custom
from plugins.errors import InputError, UserError
from tests.exporter.graph_cases import feeds
from tests.exporter.run.test_sessions import IDS, relative

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a8 qqq": {"op": "QQQGemm", "act_symmetric": True},
    "w8a8": {"wbits": 8, "abits": 8},
    "w2*a5 g16": {"wbits": 2, "balanced": True, "abits": 5, "group_size": 16},
    "w3a16": {"wbits": 3, "abits": 16},
    "w4a8 kv4": {"abits": 8, "kv_bits": 4},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_logits_are_those_of_the_bodies(
    tiny_export: Callable[..., Path], scheme: dict[str, Any]
) -> None:
    """In fp32 the nodes around the GEMMs are the same too, but for the order of their sums."""
    out = tiny_export(**scheme, dtype="float32")
    with open_session("native", out) as fast, open_session("onnxruntime", out) as bodies:
        for ids in (IDS, IDS[:, :1], IDS[:, 3:7]):
            got, want = fast.run(ids), bodies.run(ids)
            assert got.dtype == want.dtype == np.float32
            assert relative(got, want) < 1e-3
        assert fast.length == bodies.length == 16


@pytest.mark.parametrize("dtype, limit", [("float16", 0.05), ("bfloat16", 0.2)])
def test_16_bit_files_run_as_they_are(
    tiny_export: Callable[..., Path], dtype: str, limit: float
) -> None:
    out = tiny_export(abits=8, dtype=dtype)
    with open_session("native", out) as fast, open_session("torch", out) as torch:
        for ids in (IDS, IDS[:, :1]):
            assert relative(fast.run(ids), torch.run(ids)) < limit


def test_the_kernels_run_and_not_the_bodies(tiny_export: Callable[..., Path]) -> None:
    """A session lists the nodes that it runs only in a profile."""
    import json

    import onnxruntime

    out = tiny_export(abits=8, dtype="float32")
    library = native.native_library()
    assert isinstance(library, Path)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(out.parent / "profile")
    session = onnxruntime.InferenceSession(
        str(out / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    cache = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    session.run(None, feeds(IDS, cache))
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert "ABQGemm" in ran and "BitwiseAnd" not in ran


def test_kernels_need_no_bodies(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """Of a file without its function bodies, only a session with kernels can be made: those of the
    proof's native level run kernels indeed.
    """
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    with OnnxSession(folder, 64) as whole:
        want = whole.run(IDS)
    gemms = [function for function in model.functions if is_custom(function.domain)]
    for function in gemms:
        model.functions.remove(function)
    onnx.save(model, folder / "model.onnx")
    library = native.native_library()
    assert isinstance(library, Path)
    with OnnxSession(folder, 64, kernels=library) as session:
        np.testing.assert_array_equal(session.run(IDS), want)
    with pytest.raises(InputError, match="got a model that cannot be run"):
        OnnxSession(folder, 64)


def test_without_a_compiler_the_bodies_run(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = UserError("g++", "got no such program, expected a C++ compiler", "Install it")
    monkeypatch.setattr(native, "native_library", lambda: missing)
    out = tiny_export(abits=8)
    assert choose_runner(out).name == "onnxruntime"
    with pytest.raises(InputError) as caught:
        find_model(out, "native")
    assert str(caught.value) == (
        "--runner native: got no library of native kernels (g++: got no such program, expected a "
        "C++ compiler). Install g++, or use --runner onnxruntime."
    )
