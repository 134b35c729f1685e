"""The graph in pieces computes what it computes whole; the proof of an engine in pieces, with ONNX Runtime
in TensorRT's place: honest, with planted faults, half done; and by TensorRT itself as far as it goes
without a GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from exporter.graph.decoder import export_onnx
from exporter.graph.names import layer_output
from exporter.proof import engine_levels
from exporter.proof import validate as proof
from exporter.proof.engine import Built
from exporter.proof.memory import Fit
from exporter.proof.options import ValidateOptions
from exporter.proof.pieces import OnnxPiece, Piece, PieceSession, pieces, run_pieces
from exporter.proof.runners import gemm_nodes
from exporter.proof.validate import validate
from exporter.run.onnxruntime import OnnxSession, load_model
from plugins.errors import InputError
from plugins.tools.build import build_library
from tests.conftest import FAMILIES
from tests.exporter.engine.test_engine import needs_rtx
from tests.exporter.graph_cases import export
from tests.exporter.proof.test_validate import with_engine

IDS = np.array([[5, 300, 17, 42, 99, 7], [8, 9, 10, 11, 12, 13]], np.int64)
CALLS = [
    (IDS, np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.int64)),
    (IDS[:, :1], np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], np.int64)),
    (IDS[:1], np.ones((1, 6), np.int64)),
]


def inner(out: Path) -> list[str]:
    nodes = gemm_nodes(load_model(out / "onnx"), read_quant(out / "quant").decoder)
    names = [name for node in nodes for name in (node.source, node.result)]
    return list(dict.fromkeys([*names, *map(layer_output, range(2))]))


@pytest.mark.parametrize(
    "scheme", [{"head": 8}, {"kv_bits": 4, "static": 32}, {"dtype": "bfloat16"}], ids=str
)
def test_pieces_compute_what_the_graph_does(
    tiny_export: Callable[..., Path], scheme: dict[str, Any]
) -> None:
    out = tiny_export(**scheme)
    dtype, marked = scheme.get("dtype", "float16"), inner(out)
    found = pieces(load_model(out / "onnx"), 2, marked, 0, range(3))
    assert [(piece.first, piece.end) for piece in found] == [(0, 1), (1, 2), (2, 3)]
    assert [piece.stream for piece in found] == ["", layer_output(0), layer_output(1)]

    @contextmanager
    def opened(piece: Piece) -> Iterator[PieceSession]:
        yield PieceSession(piece, OnnxPiece(piece, out / "onnx"), 64, dtype)

    got = run_pieces(found, CALLS, opened, [{}] * 3)
    with OnnxSession(out / "onnx", 64, marked, dtype) as session:
        for (ids, mask), outputs in zip(CALLS, got, strict=True):
            if ids.shape == mask.shape:
                session.reset()
            want = session.step(ids, mask)
            assert outputs.keys() == want.keys()
            real = mask[:, -ids.shape[1] :] > 0
            for name, array in want.items():
                if array.ndim == 3:
                    np.testing.assert_array_equal(outputs[name][real], array[real], name)


def test_as_many_layers_as_fit_are_a_piece(tiny_export: Callable[..., Path]) -> None:
    model = load_model(tiny_export() / "onnx")

    def bounds(most: int, judged: range = range(3)) -> list[tuple[int, int]]:
        return [(piece.first, piece.end) for piece in pieces(model, 2, [], most, judged)]

    assert bounds(1 << 30) == [(0, 3)]
    layer = sum(
        int(item.value)
        for tensor in model.graph.initializer
        if tensor.name.startswith("model.layers.0.")
        for item in tensor.external_data
        if item.key == "length"
    )
    assert bounds(2 * layer) == [(0, 2), (2, 3)]
    assert bounds(2 * layer - 1) == [(0, 1), (1, 2), (2, 3)]
    assert bounds(1 << 30, range(1, 2)) == [(1, 2)]


Fault = Callable[[dict[str, np.ndarray]], None]


class StandIn:
    """ONNX Runtime with native kernels in TensorRT's place: it computes each piece indeed."""

    fault: Fault | None = None

    def __init__(self, stage: Any, onnx: Path, options: Any) -> None:
        self._folder, self.built = onnx, Built()

    def check(self, piece: Piece) -> None:
        self.built.engines += 1
        self.built.layers += piece.end - piece.first

    @contextmanager
    def runner(self, piece: Piece) -> Iterator[StandIn]:
        self.check(piece)
        self._piece = OnnxPiece(piece, self._folder)
        yield self

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._piece.infer(feeds)
        if self.fault is not None:
            self.fault(outputs)
        return outputs


@pytest.fixture
def engine(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """OUT with an engine, a GPU, and what stands in for both."""
    out = Path(shutil.copytree(tiny_export(), tmp_path / "out"))
    with_engine(out)
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: ["9.0"])
    monkeypatch.setattr(
        "exporter.run.tensorrt.TensorrtRunner.open",
        lambda runner, stage, description: Whole(out / "onnx", description.max_context),
    )
    monkeypatch.setattr(engine_levels, "ProofEngines", StandIn)
    monkeypatch.setattr(StandIn, "fault", None)
    monkeypatch.setattr(engine_levels, "_PIECE", 0)
    return out


class Whole(OnnxSession):
    """The engine as users run it; of one sequence."""

    max_batch = 1


TENSORRT = ValidateOptions(tokens=12, steps=1, runners=("tensorrt",))


def test_an_honest_engine_is_proven(engine: Path) -> None:
    result = validate(engine, TENSORRT)
    assert result.ok, result.first_failure
    rows = [row for row in result.rows if row.level == "engine"]
    assert {row.phase for row in rows} == {"prefill", "decode", "padded batch"}
    assert [row.tensor for row in rows[:3]] == [layer_output(0), layer_output(1), "logits"]
    assert all(row.operator and row.operator_limit and row.relative is not None for row in rows)
    assert {row.phase for row in result.rows if row.level == "kernel"} == {"prefill", "decode"}
    assert result.notes[1:] == (
        "The engine takes 1 sequence at once, so the padded batch was not run in it.",
        "3 proof engines of 3 decoder layers, the head counted, with 0 plugin layers and 0 tensors as outputs were built "
        "and run.",
    )
    assert result.warnings == ()


def wrong_channel(outputs: dict[str, np.ndarray]) -> None:
    if "model.layers.1.mlp.gate_up_proj.output" in outputs:
        outputs["model.layers.1.mlp.gate_up_proj.output"][..., 9] *= 2


def wrong_attention(outputs: dict[str, np.ndarray]) -> None:
    if "model.layers.0.self_attn.context" in outputs:
        outputs["model.layers.0.self_attn.context"][:] *= np.float16(1.1)


def lost_residual(outputs: dict[str, np.ndarray]) -> None:
    if layer_output(1) in outputs:
        outputs[layer_output(1)] = outputs["model.layers.1.mlp.down_proj.output"].copy()


def other_logits(outputs: dict[str, np.ndarray]) -> None:
    if "logits" in outputs:
        outputs["logits"][..., 3] += 1


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (
            wrong_channel,
            " in output channel 9 at model.layers.1.mlp.gate_up_proj (with post_attention_layernorm)",
        ),
        (wrong_attention, " at model.layers.0.self_attn.context"),
        (lost_residual, " at model.layers.1.output"),
        (other_logits, " at lm_head"),
    ],
)
def test_a_fault_of_an_engine_is_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, where: str
) -> None:
    """Not a layer further on, and not by the engine as a whole, which is right here."""
    monkeypatch.setattr(StandIn, "fault", staticmethod(fault))
    result = validate(engine, TENSORRT)
    assert re.sub(r"error of \S+", "error of N", result.first_failure).startswith(
        f"got a relative error of N{where} given its inputs (engine, prefill: TensorRT's engines with "
        "inner tensors as outputs against the rounded graph), expected at most 0.00"
    )
    assert {row.level for row in result.rows if not row.ok} == {"engine"}
    assert bool(result.warnings) == (fault in (lost_residual, other_logits))


def test_some_layers_of_an_engine(engine: Path) -> None:
    """The first of them reads what ONNX Runtime gave."""
    result = validate(
        engine, ValidateOptions(tokens=8, steps=0, runners=("tensorrt",), layers=(1, 2))
    )
    assert result.ok and result.notes[-1].startswith("2 proof engines of 2 decoder layers, ")


def test_without_a_gpu_half_of_it_is_done(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: [])
    result = validate(engine, TENSORRT)
    assert result.ok and result.rows == ()
    assert result.notes[1:] == (
        "No GPU here: the engine was built but not run, so the CUDA kernels were not executed in this "
        "validation.",
        "TensorRT was half done: 3 proof engines of 3 decoder layers, the head counted, with 0 plugin layers and 0 "
        "tensors as outputs were built, and give what the graph says in its types; they were not run.",
    )


@pytest.fixture(scope="module")
def experts(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a tiny Mixtral."""
    model = tiny_llama(architecture="Mixtral", **FAMILIES["Mixtral"])
    scheme = QuantScheme("ABQGemm", "rtn", 4, 8)
    return export(model, scheme, tmp_path_factory.mktemp("experts")).parent


def moved_stream(outputs: dict[str, np.ndarray]) -> None:
    if layer_output(0) in outputs:
        outputs[layer_output(0)] = np.roll(outputs[layer_output(0)], 7, -1)


@pytest.mark.slow
def test_an_engine_may_choose_other_experts(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are then those of other tokens, which only the operators can be judged on."""
    made = StandIn(None, experts / "onnx", None)
    made.fault = moved_stream
    monkeypatch.setattr(proof, "find_proof_engines", lambda _: made)
    monkeypatch.setattr(
        proof,
        "find_engine",
        lambda found: lambda: Whole(experts / "onnx", found.scope.context),
    )
    monkeypatch.setattr(engine_levels, "_PIECE", 0)
    result = validate(experts, TENSORRT)
    assert " at model.layers.0.output given its inputs (engine, prefill: " in result.first_failure
    assert {row.level for row in result.rows} == {"kernel", "engine"}


@pytest.mark.slow
def test_experts_with_a_static_cache_in_pieces(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(experts, tmp_path / "out"))
    shutil.rmtree(out / "onnx")
    (out / "onnx").mkdir()
    export_onnx(read_quant(out / "quant"), out / "onnx", static=True, max_context=32)
    monkeypatch.setattr(proof, "check_memory", lambda *given: Fit(True, True, 0))
    result = validate(out, ValidateOptions(tokens=12, steps=1, runners=("native",)))
    assert result.ok, result.first_failure
    assert "native" in {row.level for row in result.rows}


def test_an_artifact_without_an_engine(tiny_export: Callable[..., Path]) -> None:
    out = tiny_export()
    with pytest.raises(InputError) as error:
        validate(out, TENSORRT)
    assert str(error.value).startswith(
        f"{out}: got no engine folder, expected it for --runner tensorrt."
    )


DRIVER = """
import json, sys
from pathlib import Path
from calibration.quant.folder import read_quant
from exporter.engine.build import EngineOptions, build_engine
from exporter.proof.engine import ProofEngines
from exporter.proof.pieces import pieces
from exporter.run.onnxruntime import load_model
from plugins.errors import UserError
from tests.exporter.engine.test_engine import two_gemms
from tests.exporter.proof.test_pieces import inner
out, library, folder = map(Path, sys.argv[1:])
two_gemms(folder)
build_engine(folder / "model.onnx", library, folder, EngineOptions("tensorrt-rtx", 1, 8))
class Stage:
    file = staticmethod(lambda name: folder / name)
engines = ProofEngines(Stage, out / "onnx", EngineOptions(max_batch=2, max_seq=16))
found = pieces(load_model(out / "onnx"), 2, inner(out), 0, range(3))
path, sizes = folder / "piece.engine", []
for piece in found:
    engines.build(piece, path)
    sizes.append(path.stat().st_size)
print(json.dumps([sizes, str(engines.built)]))
found[0].model.graph.output[-1].type.tensor_type.elem_type = 1
try:
    engines.check(found[0])
except UserError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@needs_rtx
def test_tensorrt_builds_the_pieces(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """Every marked tensor is an output of its type, and every custom node a plugin."""
    out = tiny_export(head=8)
    command = [sys.executable, "-c", DRIVER, str(out), str(build_library()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (sizes, built), error = map(json.loads, done.stdout.splitlines())
    assert len(sizes) == 3 and min(sizes) > 1000
    assert re.fullmatch(
        r"3 proof engines of 3 decoder layers, the head counted, with 9 plugin layers and \d\d tensors as outputs",
        built,
    )
    assert error[0] == "CheckError" and re.fullmatch(
        re.escape(f"{out / 'onnx/model.onnx'}, tensor ")
        + r"\S+: got DataType\.HALF, expected an output of DataType\.FLOAT\. TensorRT read the graph "
        "otherwise than it is: report this\\.",
        error[1],
    )
