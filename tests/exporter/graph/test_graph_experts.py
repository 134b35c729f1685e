"""Experts in the graph: which of them a token computes, a static cache around them, and what the
proof finds in a router.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.out.layout import MODEL_FILE
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from exporter.graph.decoder import export_onnx
from exporter.graph.names import is_routed
from exporter.proof.runners import gemm_nodes
from exporter.run.native import native_library
from exporter.run.onnxruntime import OnnxSession, load_model
from plugins.errors import CheckError
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import Decoder, export, feeds

IDS = np.random.default_rng(5).integers(0, 512, (2, 9))


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The onnx folder of a tiny Mixtral: 2 layers of 5 experts, 2 of them for a token."""
    model = tiny_llama(architecture="Mixtral", **FAMILIES["Mixtral"])
    scheme = QuantScheme("ABQGemm", "rtn", 4, 8, dtype="float32")
    return export(model, scheme, tmp_path_factory.mktemp("experts"))


def rows_of_experts(folder: Path, ids: np.ndarray) -> Counter[str]:
    """How many rows each expert's node multiplies, as ONNX Runtime's profile tells."""
    library = native_library()
    assert isinstance(library, Path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    decoder = Decoder(folder)
    decoder.session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options)
    decoder(feeds(ids, decoder.empty(len(ids))))
    path = Path(decoder.session.end_profiling())
    found: Counter[str] = Counter()
    for event in json.loads(path.read_text()):
        name = event["name"].removesuffix("_kernel_time")
        if event.get("args", {}).get("op_name") == "ABQGemm" and is_routed(f"{name}."):
            ((_, count, _),) = event["args"]["input_type_shape"][0].values()
            found[name] += count
    path.unlink()
    return found


def test_a_token_computes_the_experts_that_it_chose_and_no_others(folder: Path) -> None:
    found = rows_of_experts(folder, IDS[:1, :1])
    assert len(found) == 2 * 5 * 2  # layers, experts, nodes
    assert sorted(found.values()) == [0] * (2 * 3 * 2) + [1] * (2 * 2 * 2)
    by_layer = Counter(name.split(".")[2] for name, rows in found.items() if rows)
    assert by_layer == {"0": 4, "1": 4}
    for name, rows in found.items():
        if name.endswith("gate_up_proj"):
            assert found[name.replace("gate_up_proj", "w2")] == rows


def test_tokens_are_shared_out(folder: Path) -> None:
    found = rows_of_experts(folder, IDS)
    assert sum(found.values()) == 2 * 2 * 2 * IDS.size
    assert len(set(found.values())) > 2


def test_a_static_cache_gives_the_same(folder: Path, tmp_path: Path) -> None:
    quant = read_quant(folder.parent / "quant")
    export_onnx(quant, tmp_path, static=True, max_context=16)
    mask = np.ones_like(IDS)
    mask[0, :3] = 0
    wider = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    logits = []
    for place in (folder, tmp_path):
        session = OnnxSession(place, 16)
        found = [session.step(IDS, mask)["logits"], session.step(IDS[:, :1], wider)["logits"]]
        session.close()
        logits.append(np.concatenate([array[:, -1] for array in found]))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)


def test_experts_without_their_router_are_no_graph_of_ours(folder: Path) -> None:
    decoder, model = read_quant(folder.parent / "quant").decoder, load_model(folder)
    name = "model.layers.1.block_sparse_moe.gate"
    router = [node for node in gemm_nodes(model, decoder) if node.router]
    assert [(node.name, node.source) for node in router] == [
        (f"model.layers.{layer}.block_sparse_moe.gate", f"model.layers.{layer}.residual")
        for layer in (0, 1)
    ]
    for node in model.graph.node:
        for place, output in enumerate(node.output):
            if output == f"{name}.output":
                node.output[place] = "other"
    with pytest.raises(CheckError) as caught:
        gemm_nodes(model, decoder)
    assert str(caught.value) == (
        f"{MODEL_FILE}: got no tensor {name}.output, expected it in front of the experts. "
        "The graph was changed after its export: export the model again."
    )


def test_every_expert_has_two_nodes(folder: Path) -> None:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    routed = [node.name for node in graph.node if node.op_type == "ABQGemm"]
    experts = [name for name in routed if is_routed(f"{name}.")]
    assert len(experts) == 20 and len(routed) == 24
    assert experts[:2] == [
        f"model.layers.0.block_sparse_moe.experts.{expert}.gate_up_proj" for expert in (0, 1)
    ]
