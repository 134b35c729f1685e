"""The ONNX file with native kernels: the numbers of the function bodies, where it can run, what it
says where it cannot.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.out.layout import DATA_FILE
from exporter.run import native, onnxruntime
from exporter.run.model import choose_runner, find_model, open_session
from exporter.run.native import NativeSession
from exporter.run.onnxruntime import OnnxSession
from plugins.core.function import is_inlined
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


GROUPS = {"op": "QQQGemm", "act_symmetric": True, "group_size": 64}


@pytest.mark.parametrize(
    "scheme, limit",
    [({}, 0.05), ({"dtype": "bfloat16"}, 0.2), (GROUPS, 0.05)],
    ids=["float16", "bfloat16", "float16 qqq groups"],
)
def test_16_bit_files_run_as_they_are(
    tiny_export: Callable[..., Path], scheme: dict[str, Any], limit: float
) -> None:
    """ONNX Runtime makes fp32 of the fp16 constants of some nodes, such as scale_group."""
    out = tiny_export(abits=8, **scheme)
    with open_session("native", out) as fast, open_session("torch", out) as torch:
        for ids in (IDS, IDS[:, :1]):
            assert relative(fast.run(ids), torch.run(ids)) < limit


def test_the_kernels_run_and_not_the_bodies(tiny_export: Callable[..., Path]) -> None:
    """A session lists the nodes that it runs only in a profile."""
    import json

    import onnxruntime as ort

    out = tiny_export(abits=8, dtype="float32")
    library = native.native_library()
    assert isinstance(library, Path)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(out.parent / "profile")
    session = ort.InferenceSession(
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


@pytest.mark.parametrize("fields", [{}, {"static": 32}, {"kv_bits": 4}], ids=str)
def test_no_cast_is_left_but_that_of_the_logits(
    tiny_export: Callable[..., Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    """ONNX Runtime casts around 16-bit nodes that it has no kernels for."""
    import onnxruntime as ort

    folder = tiny_export(head=8, **fields) / "onnx"
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(native.native_library()))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    casts = [list(node.output) for node in nodes if node.op_type == "Cast"]
    masks = [] if "static" in fields else [["mask.valid"]]
    assert sorted(casts) == [["logits"], *masks]


def test_kernels_need_no_bodies(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """Of a file without its function bodies, only a session with kernels can be made: those of the
    proof's native level run kernels indeed.
    """
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    with OnnxSession(folder, 64) as whole:
        want = whole.run(IDS)
    del model.functions[:]
    onnx.save(model, folder / "model.onnx")
    library = native.native_library()
    assert isinstance(library, Path)
    with OnnxSession(folder, 64, kernels=library) as session:
        np.testing.assert_array_equal(session.run(IDS), want)
    with pytest.raises(InputError, match="got a model that cannot be run"):
        OnnxSession(folder, 64)


def test_whoever_opens_first_is_told_of_the_compiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nobody compiles again, whether it went well or not."""
    native._library.cache_clear()
    made: list[str] = []

    def build(say: Callable[[str], None] | None) -> Path:
        assert say is not None
        say("compiling")
        made.append("library")
        return tmp_path

    monkeypatch.setattr("plugins.tools.build.build_onnxruntime", build)
    told: list[str] = []
    assert native.native_library(told.append) == native.native_library() == tmp_path
    assert (told, made) == (["compiling"], ["library"])
    native._library.cache_clear()


def test_without_a_compiler_the_bodies_run(
    tiny_export: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = UserError("g++", "got no such program, expected a C++ compiler", "Install it")
    monkeypatch.setattr(native, "native_library", lambda: missing)
    out = tiny_export(abits=8)
    capsys.readouterr()
    for stage in (None, "onnx"):
        assert choose_runner(out, stage).name == "onnxruntime"
        assert capsys.readouterr().err == (
            "Running onnxruntime, which is slower: --runner native: got no library of native "
            "kernels (g++: got no such program, expected a C++ compiler). Install g++, or use "
            "--runner onnxruntime.\n"
        )
    assert find_model(out, "cpu").runner.name == "onnxruntime"
    with pytest.raises(InputError) as caught:
        find_model(out, "native")
    assert str(caught.value) == (
        "--runner native: got no library of native kernels (g++: got no such program, expected a "
        "C++ compiler). Install g++, or use --runner onnxruntime."
    )


def test_a_node_that_would_run_its_body_is_refused(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    """In a domain that the library does not have, ONNX Runtime takes the function silently."""
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if is_custom(node.domain)]
    all_nodes = [*nodes, *(node for node in model.graph.node if is_inlined(node.domain))]
    for changed in (model.functions[0], nodes[0], model.opset_import.add(version=1)):
        changed.domain = "anybit.v256"
    model.functions.extend(onnx.load(folder / "model.onnx", load_external_data=False).functions[:1])
    onnx.save(model, folder / "model.onnx")
    with OnnxSession(folder, 64) as bodies:
        assert np.isfinite(bodies.run(IDS)).all()
    with pytest.raises(InputError) as caught:
        NativeSession(folder, 64, "float16")
    assert str(caught.value) == (
        f"{folder / 'model.onnx'}: got {len(all_nodes)} custom nodes of which ONNX Runtime runs 1 by "
        f"their function bodies, expected native kernels for all. The graph was changed, or has "
        f"more than 256 schemes of an op: export the model again, or use --runner onnxruntime."
    )


def test_a_file_for_another_version_of_the_kernels(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if is_custom(node.domain))
    for item in node.attribute:
        if item.name == "plugin_version":
            item.s = b"2"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(InputError, match="got plugin_version 2, expected 1, which this library"):
        NativeSession(folder, 64, "float16")


@pytest.mark.parametrize("left", [0, 5000])
def test_a_data_file_that_was_cut_off_is_refused_at_once(
    tiny_export: Callable[..., Path], tmp_path: Path, left: int
) -> None:
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    os.truncate(folder / DATA_FILE, left)
    with pytest.raises(InputError, match="The file or its data is damaged or changed"):
        NativeSession(folder, 64, "float16")


def test_weights_that_change_under_a_session(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    """A new file under the name leaves the session its own; one that is written to ends it."""
    folder = Path(shutil.copytree(tiny_export(abits=8) / "onnx", tmp_path / "onnx"))
    data = folder / DATA_FILE
    with NativeSession(folder, 64, "float16") as session:
        want = session.run(IDS)
        (folder / "new").write_bytes(bytes(data.stat().st_size))
        (folder / "new").replace(data)
        np.testing.assert_array_equal(session.run(IDS, reset=True), want)
    with NativeSession(folder, 64, "float16") as session:
        os.truncate(data, 0)
        with pytest.raises(InputError) as caught:
            session.run(IDS)
    assert str(caught.value) == (
        f"{data}: got weights that were written to while a session had them open, expected the same "
        f"file until it is closed. Start again; write a new file and rename it."
    )


@pytest.mark.parametrize("scheme", [{}, {"kv_bits": 4}], ids=["float16", "kv4"])
@pytest.mark.parametrize("static", [0, 40], ids=["growing", "static"])
def test_new_sequences_know_nothing_of_the_old(
    tiny_export: Callable[..., Path], scheme: dict[str, Any], static: int
) -> None:
    """A static cache keeps its memory, and what is in it; another batch has one of its own."""
    out = tiny_export(abits=8, static=static, **scheme)
    texts = [IDS, np.concatenate([IDS[:, ::-1], IDS]), IDS[:, 2:5], IDS[:, :1]]
    with open_session("native", out) as session:
        assert isinstance(session, NativeSession)
        session.run(np.tile(IDS, 3))
        bytes_before = session.cache_bytes
        for ids in (*texts, *texts[::-1]):
            got = [session.run(ids, reset=True), *(session.run(ids[:, :1]) for _ in range(2))]
            assert session.length == ids.shape[1] + 2
            if static:
                assert session.cache_bytes == len(ids) * bytes_before
            with open_session("native", out) as new:
                want = [new.run(ids), *(new.run(ids[:, :1]) for _ in range(2))]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_session_has_a_thread_for_each_core(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_export(abits=8) / "onnx"
    for cores in (1, 3):
        monkeypatch.setattr(onnxruntime, "usable_cores", lambda cores=cores: cores)
        session = native.native_session(folder, "float16")
        assert session.get_session_options().intra_op_num_threads == cores
