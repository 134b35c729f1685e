"""Engines built by a real TensorRT-RTX from tiny ONNX files, all in one process of their own: plugin
registration is global.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.quant.folder import read_quant
from calibration.quant.keep import Keeping, kept_schemes
from calibration.quant.scheme import QuantScheme
from exporter.engine.build import EngineOptions, custom_nodes, profile_shapes
from exporter.engine.edition import check_engine, select_edition
from exporter.engine.limits import EngineLimits, engine_limits
from exporter.graph.nodes import NodeFactory
from plugins import op_spec
from plugins.core.op_spec import DOMAIN, GemmAttributes, QuantArrays
from plugins.errors import InputError, UserError
from plugins.tools.build import build_library
from tests.calibration.formats import written
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import export
from tests.real_tensorrt import RealTensorrt, showing

Build = Callable[..., tuple[Any, list[dict[str, Any]]]]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13"
)

OPSET = [
    helper.make_opsetid("", 23),
    helper.make_opsetid(DOMAIN, 1),
    helper.make_opsetid(f"{DOMAIN}.v1", 1),
]
ABQ = GemmAttributes(4, 16, 8, 0, 32, 64, 48, 0)
QQQ = GemmAttributes(4, 16, 8, 1, 0, 48, 64, 1, norm_epsilon=1e-5)


def arrays(op: str, attrs: GemmAttributes) -> QuantArrays:
    """Some valid weights."""
    rng = np.random.default_rng(0)
    shape, scale = (
        (attrs.out_features, attrs.in_features),
        np.full((attrs.out_features, attrs.n_groups), 0.01, np.float32),
    )
    minimum = np.full(scale.shape, -0.08, np.float32)
    zero = np.full(scale.shape, 8, np.int32)
    bias = rng.standard_normal(attrs.out_features).astype(np.float32) if attrs.has_bias else None
    if op == "QQQGemm":
        return QuantArrays(rng.integers(-7, 8, shape).astype(np.int8), scale, bias=bias)
    codes = rng.integers(0, attrs.levels, shape).astype(np.uint8)
    if attrs.has_minimum:
        return QuantArrays(codes, scale, bias=bias, minimum=minimum)
    return QuantArrays(codes, scale, zero, bias=bias)


def two_gemms(
    folder: Path,
    dtype: int = TensorProto.FLOAT16,
    second: tuple[str, GemmAttributes] = ("QQQGemm", QQQ),
) -> onnx.ModelProto:
    """X -> ABQGemm "up" -> QQQGemm (or another) "down" -> Y, saved with function bodies as
    model.onnx.
    """
    factory, nodes, initializers, source = NodeFactory(dtype), [], [], "X"
    for op, attrs, name in (("ABQGemm", ABQ, "up"), (*second, "down")):
        spec = op_spec(op)
        packed = spec.pack(arrays(op, attrs), attrs, name)
        packed["gamma"] = np.ones(attrs.in_features, helper.tensor_dtype_to_np_dtype(dtype))
        inputs = [f"{name}.{key}" for key in spec.input_names(attrs)[1:]]
        initializers += [
            numpy_helper.from_array(packed[key.split(".", 1)[1]], key) for key in inputs
        ]
        nodes.append(factory.gemm(op, attrs, name, [source, *inputs], f"{name}.output"))
        source = f"{name}.output"
    return save(folder, nodes, initializers, source, dtype, list(factory.functions()))


def save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    output: str,
    dtype: int,
    functions: list[onnx.FunctionProto],
) -> onnx.ModelProto:
    """Write model.onnx with input X [B, S, 64] and one output."""
    info = [helper.make_tensor_value_info(name, dtype, ["B", "S", 64]) for name in ("X", output)]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=OPSET, functions=functions, ir_version=11)
    onnx.save(model, str(folder / "model.onnx"))
    return model


DRIVER = """
import io, json, sys
from pathlib import Path
from calibration.progress import JsonProgress
from exporter.engine.build import EngineOptions, build_engine
from plugins.errors import UserError
library, edition = Path(sys.argv[1]), sys.argv[2]
for line in sys.stdin:
    folder, events = Path(json.loads(line)), io.StringIO()
    try:
        options = EngineOptions(edition, 2, 16)
        found = build_engine(folder / "model.onnx", library, folder, options, JsonProgress(events))
    except (UserError, OSError) as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([found, events.getvalue()]), flush=True)
"""


class Builder:
    """A process that builds engines with TensorRT-RTX or another, and what it says on stderr."""

    def __init__(self, real: RealTensorrt | None, said: Path) -> None:
        edition = real.edition if real else "tensorrt-rtx"
        self._said = said
        with said.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(build_library()), edition],
                env=real.environment if real else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def build(self, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
        """What the driver found, and the progress events."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(str(folder)), file=self._process.stdin, flush=True)
        answer, said = self._process.stdout.readline(), self._said.read_text()
        assert answer and not said, said
        found, events = json.loads(answer)
        return found, [json.loads(line) for line in events.splitlines()]

    def end(self) -> int:
        """Its exit code."""
        self._process.communicate(timeout=60)
        return self._process.returncode


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """build(folder, real=None) -> engine.json of TensorRT-RTX or another, or [class, text] of the error;
    and the progress events. Fails if anything else is printed.
    """
    builders: dict[RealTensorrt | None, Builder] = {}

    def call(folder: Path, real: RealTensorrt | None = None) -> tuple[Any, list[dict[str, Any]]]:
        builder = builders.pop(real, None)
        builder = builder or Builder(real, tmp_path_factory.mktemp("builder") / "stderr")
        found = builder.build(folder)
        builders[real] = builder  # one that failed is not asked again
        return found

    yield call
    assert not any(builder.end() for builder in builders.values())


@pytest.mark.parametrize("real", showing("engines built"))
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_custom_nodes_become_plugins(
    build: Build, real: RealTensorrt, tmp_path: Path, dtype: int
) -> None:
    two_gemms(tmp_path, dtype)
    record, events = build(tmp_path, real=real)
    assert record["layers"]["PLUGIN_V3"] == 2
    assert record["custom_nodes"] == {"ABQGemm": 1, "QQQGemm": 1}
    assert (record["edition"], record["version"]) == (real.edition, real.version)
    assert [profile["name"] for profile in record["profiles"]] == ["prefill", "decode"]
    assert record["max_context"] == 16
    assert record["bytes"] == (tmp_path / "model.engine").stat().st_size > 1000
    plan = (tmp_path / "model.engine").read_bytes()  # what the runtime hands to createPlugin again
    told_by_an_input = {"has_minimum"}
    fields = GemmAttributes.__dataclass_fields__.keys() - told_by_an_input
    assert all(name.encode() in plan for name in ("ABQGemm", "QQQGemm", *fields))
    assert (tmp_path / "libanybit_plugins.so").read_bytes() == build_library().read_bytes()
    assert json.loads((tmp_path / "engine.json").read_text()) == record
    assert [event["event"] for event in events if event["event"] != "message"][
        :: len(events) - 1
    ] == ["start", "finish"]
    assert check_engine(tmp_path) == record


@needs_rtx
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_build(build: Build, tmp_path: Path) -> None:
    two_gemms(tmp_path)
    (tmp_path / "model.engine").symlink_to("/dev/full")
    assert build(tmp_path)[0] == ["OSError", "[Errno 28] No space left on device"]


@needs_rtx
@pytest.mark.parametrize(
    "attrs",
    [
        GemmAttributes(4, 16, 8, 1, 0, 48, 64, 1),
        GemmAttributes(4, 16, 8, 0, 16, 48, 64, 1, has_minimum=1),
    ],
    ids=["symmetric", "minimums"],
)
def test_nodes_of_a_further_scheme_become_plugins(
    build: Build, tmp_path: Path, attrs: GemmAttributes
) -> None:
    model = two_gemms(tmp_path, second=("ABQGemm", attrs))
    assert [node.domain for node in model.graph.node] == [DOMAIN, f"{DOMAIN}.v1"]
    record, events = build(tmp_path)
    assert "message" not in {event["event"] for event in events}  # the parser warns of nothing
    assert record["layers"]["PLUGIN_V3"] == 2
    assert record["custom_nodes"] == {"ABQGemm": 2}


@needs_rtx
def test_every_node_of_a_mixed_model_becomes_a_plugin(
    tiny_export: Callable[..., Path], mixed: dict[str, Any], build: Build, tmp_path: Path
) -> None:
    """The head too."""
    shutil.copytree(tiny_export(**mixed, head=8) / "onnx", tmp_path, dirs_exist_ok=True)
    record, _ = build(tmp_path)
    assert record["layers"]["PLUGIN_V3"] == 9
    assert record["custom_nodes"] == {"QQQGemm": 3, "ABQGemm": 6}


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_low_bit_cache_is_built_from_standard_ops(
    tiny_export: Callable[..., Path], build: Build, tmp_path: Path, dtype: str
) -> None:
    folder = shutil.copytree(tiny_export(kv_bits=4, dtype=dtype) / "onnx", tmp_path / "onnx")
    record, _ = build(folder)
    assert record["layers"]["PLUGIN_V3"] == 8 and record["custom_nodes"] == {"ABQGemm": 8}
    assert record["layers"]["ATTENTION_INPUT"] == 2


QUICK = [
    ("Gemma2", "bfloat16"),
    ("Gemma2", "float32"),
    ("Granite", "bfloat16"),
    ("Mixtral", "float16"),
    ("Olmo2", "float32"),
    ("Phi3", "float16"),
]
SLOW = [(name, dtype) for name in FAMILIES for dtype in ("float16", "bfloat16")]


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_static_cache_is_built(
    tiny_export: Callable[..., Path], build: Build, tmp_path: Path, dtype: str
) -> None:
    folder = shutil.copytree(tiny_export(static=16, dtype=dtype) / "onnx", tmp_path / "onnx")
    record, events = build(folder)
    layers = record["layers"]
    assert layers["PLUGIN_V3"] == 8 and record["custom_nodes"] == {"ABQGemm": 8}
    assert (layers["KV_CACHE_UPDATE"], layers["ATTENTION_INPUT"]) == (4, 2)
    assert len(record["attentions"]) == (2 if dtype == "float32" else 0)
    prefill, decode = (profile["inputs"] for profile in record["profiles"])
    assert prefill["write_indices"] == {"min": [1], "opt": [1], "max": [2]}
    sizes = {"min": [1, 2, 16, 16], "opt": [1, 2, 16, 16], "max": [2, 2, 16, 16]}
    assert prefill["past_key_values.1.value"] == decode["past_key_values.1.value"] == sizes
    assert engine_limits(record) == EngineLimits(max_batch=2, max_tokens=16, max_context=16)
    assert not [event for event in events if "already exists" in str(event)]


@needs_rtx
@pytest.mark.usefixtures("more_families")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW if one not in QUICK)],
)
def test_every_step_is_built(
    tiny_llama: Callable[..., Path], build: Build, tmp_path: Path, name: str, dtype: str
) -> None:
    model = tiny_llama(architecture=name, **FAMILIES[name])
    folder = export(model, QuantScheme("ABQGemm", "rtn", 8, 16, dtype=dtype), tmp_path)
    decoder = read_quant(tmp_path / "quant").decoder
    record, _ = build(folder)
    nodes = len(decoder.nodes)
    assert record["layers"]["PLUGIN_V3"] == nodes and record["custom_nodes"] == {"ABQGemm": nodes}
    capped = sum(block.attend.softcap is not None for block in decoder.blocks)
    assert record["decomposable_attention"] == (dtype == "float32" and not capped)
    assert record["layers"].get("ATTENTION_INPUT", 0) == decoder.layers - capped
    weighted = sum(experts.normalized for _, experts in decoder.routers.values())
    assert record["layers"].get("SOFTMAX", 0) == capped + weighted
    assert record["layers"].get("TOPK", 0) == len(decoder.routers)
    turning = sum(block.rope is not None for block in decoder.blocks)
    assert record["layers"].get("ROTARY_EMBEDDING", 0) == turning


@needs_rtx
def test_input_channels_in_an_order_of_their_own_are_built(
    tiny_llama: Callable[..., Path], build: Build, tmp_path: Path
) -> None:
    """The codes of a GPTQ checkpoint with desc_act: a Gather in front of each node, of experts too; and
    a MatMul of what it has in floating point.
    """
    sizes = FAMILIES["Mixtral"] | {"num_hidden_layers": 1}
    source = tiny_llama(architecture="Mixtral", dtype="float16", **sizes)
    options = {"group": 16, "ordered": True, "left_out": ("o_proj",)}
    model = written.gptq(source, tmp_path / "model", **options).folder
    checkpoint = open_checkpoint(str(model), offline=True)
    folder = export(model, kept_schemes(checkpoint, Keeping(abits=8)), tmp_path)
    record, _ = build(folder)
    assert record["layers"]["PLUGIN_V3"] == 11 and record["custom_nodes"] == {"ABQGemm": 11}


@needs_rtx
def test_node_without_namespace_is_named(build: Build, tmp_path: Path) -> None:
    """TensorRT silently takes the function body of such a node; here one that it can build."""
    relu = helper.make_node("Relu", ["X"], ["Y"])
    body = helper.make_function(
        DOMAIN, "ABQGemm", ["X", "weight", "scale", "zero"], ["Y"], [relu], OPSET[:1]
    )
    attrs = GemmAttributes(4, 16, 8, 0, 32, 64, 64, 0)
    packed = op_spec("ABQGemm").pack(arrays("ABQGemm", attrs), attrs, "gemm")
    names = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
    body.attribute.extend([*attrs.as_dict(), *names])
    nodes = [
        helper.make_node(
            "ABQGemm",
            [source, *packed],
            [output],
            name=name,
            domain=DOMAIN,
            **attrs.as_dict(),
            **extra,
        )
        for source, output, name, extra in (
            ("X", "a", "first", names),
            ("a", "b", "second", {}),
            ("b", "c", "third", {}),
        )
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in packed.items()]
    save(tmp_path, nodes, initializers, "c", TensorProto.FLOAT16, [body])
    error, _ = build(tmp_path)
    assert error == [
        "CheckError",
        f"{tmp_path / 'model.onnx'}: got 1 plugin layers for 3 custom nodes, expected one each; "
        f"missing: second, "
        "third. Without attribute plugin_namespace on a node TensorRT takes its function body: "
        "export the model again with this version.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
def test_parser_errors_are_shown(build: Build, tmp_path: Path) -> None:
    node = helper.make_node("BitwiseNot", ["X"], ["Y"], name="odd")
    save(tmp_path, [node], [], "Y", TensorProto.INT32, [])
    error, _ = build(tmp_path)
    assert error[0] == "CheckError"
    assert re.sub(
        r"\(BitwiseNot\): .*; expected", "(BitwiseNot): REASON; expected", error[1], flags=re.DOTALL
    ) == (
        f"{tmp_path / 'model.onnx'}: got parser errors: node odd (BitwiseNot): REASON; expected "
        f"a model that this TensorRT "
        "takes. If a custom op is named, export the model again with this version; "
        "else use a newer TensorRT (10.15, 11, or RTX 1.7)."
    )


@needs_rtx
def test_weights_that_do_not_fit_the_attributes(build: Build, tmp_path: Path) -> None:
    model = two_gemms(tmp_path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "up.weight")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((4, 48, 8), np.int32), "up.weight"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    error, _ = build(tmp_path)
    assert error[0] == "CheckError"
    assert (
        "ABQGemm 'up' input weight: got shape [4, 48, 8], expected [4, 48, 4]. The weights do "
        "not fit the node's "
        "attributes: export the model again."
    ) in error[1]


@needs_rtx
def test_fp32_attention_is_built_from_parts(build: Build, tmp_path: Path) -> None:
    """TensorRT has no fused attention kernel for fp32, so without our setting the build fails."""
    names = ["query", "key", "value"]
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2, "S", 64])
        for name in [*names, "Y"]
    ]
    node = helper.make_node("Attention", names, ["Y"], name="attention", scale=0.125)
    model = helper.make_model(
        helper.make_graph([node], "g", info[:3], info[3:]), opset_imports=OPSET[:1], ir_version=11
    )
    onnx.save(model, str(tmp_path / "model.onnx"))
    record, _ = build(tmp_path)
    assert (record["decomposable_attention"], record["bytes"] > 1000) == (True, True)
    assert record["attentions"] == ["attention"]


def test_custom_nodes_are_counted_everywhere() -> None:
    """In the graph, in both branches of an If, and in a local function that is called twice."""

    def gemm(name: str, domain: str = DOMAIN) -> onnx.NodeProto:
        return helper.make_node("ABQGemm", ["x"], ["y"], name=name, domain=domain)

    def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, "g", [], [])

    function = helper.make_function("local", "Block", ["x"], ["y"], [gemm("inner")], OPSET)
    own_body = helper.make_function(
        DOMAIN, "ABQGemm", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], OPSET
    )
    otherwise = graph(gemm("else", f"{DOMAIN}.v1"), gemm(""))
    branch = helper.make_node(
        "If", ["c"], ["y"], then_branch=graph(gemm("then")), else_branch=otherwise
    )
    calls = [helper.make_node("Block", ["x"], ["y"], domain="local") for _ in range(2)]
    relu = helper.make_node("Relu", ["x"], ["y"])
    model = helper.make_model(
        graph(gemm("top"), branch, *calls, relu), functions=[function, own_body]
    )
    assert sorted(custom_nodes(model)) == [
        "else",
        "inner",
        "inner #5",
        "then",
        "top",
        "unnamed ABQGemm",
    ]
    assert set(custom_nodes(model).values()) == {"ABQGemm"}


def test_profiles_fit_each_other() -> None:
    inputs: dict[str, list[int | str]] = {
        "input_ids": ["B", "S"],
        "attention_mask": ["B", "T"],
        "logits_indices": ["B", "L"],
        "past": ["B", 2, "P", 64],
    }
    prefill, decode = profile_shapes(inputs, EngineOptions(max_batch=4, max_seq=1024))
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    assert prefill["inputs"] == {
        "input_ids": {"min": [1, 1], "opt": [1, 512], "max": [4, 1024]},
        "attention_mask": {"min": [1, 1], "opt": [1, 512], "max": [4, 2047]},
        "logits_indices": {"min": [1, 1], "opt": [1, 1], "max": [4, 128]},
        "past": {"min": [1, 2, 0, 64], "opt": [1, 2, 0, 64], "max": [4, 2, 1023, 64]},
    }
    for batch, seq, most in ((1, 2048, 512), (1, 100, 100), (1024, 2048, 1)):
        options = EngineOptions(max_batch=batch, max_seq=seq)
        assert profile_shapes(inputs, options)[0]["inputs"]["logits_indices"]["max"] == [
            batch,
            most,
        ]
    assert decode["inputs"] == {
        "input_ids": {"min": [1, 1], "opt": [1, 1], "max": [4, 1]},
        "attention_mask": {"min": [1, 1], "opt": [1, 513], "max": [4, 1024]},
        "logits_indices": {"min": [1, 1], "opt": [1, 1], "max": [4, 1]},
        "past": {"min": [1, 2, 0, 64], "opt": [1, 2, 512, 64], "max": [4, 2, 1023, 64]},
    }


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: profile_shapes({"X": ["N", 3]}, EngineOptions()),
            "model input X: got dimension 'N', expected a number or one of B, S, L, P, T. Export "
            "the model again with this version.",
        ),
        (
            lambda: EngineOptions(max_batch=0),
            "--max-batch: got 0, expected at least 1. Give a positive number.",
        ),
        (
            lambda: EngineOptions(max_seq=-1),
            "--max-seq: got -1, expected at least 1. Give a positive number.",
        ),
        (
            lambda: select_edition("cuda"),
            "--engine: got 'cuda', expected auto, tensorrt or tensorrt-rtx. Choose one of these.",
        ),
    ],
)
def test_bad_settings(call: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (InputError, text)
