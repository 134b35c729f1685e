"""The exported decoder equals the torch reference, grows its cache, ignores padding, and is the
same bytes every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.out.layout import DATA_FILE, MODEL_FILE
from calibration.quant.bits import Rule, SchemeMap
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from exporter.graph.decoder import export_onnx
from exporter.graph.names import layer_output
from exporter.run.onnxruntime import OnnxSession
from plugins.core.op_spec import is_custom
from tests.exporter.graph_cases import Decoder, export, feeds

SCHEMES = {
    "qqq": QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True, dtype="float32"),
    "qqq-g64": QuantScheme(
        "QQQGemm", "rtn", 4, 8, group_size=64, act_symmetric=True, dtype="float32"
    ),
    "w8a8": QuantScheme("ABQGemm", "rtn", 8, 8, dtype="float32"),
    "w2ba8-g32": QuantScheme("ABQGemm", "rtn", 2, 8, balanced=True, group_size=32, dtype="float32"),
    "w3a16": QuantScheme("ABQGemm", "rtn", 3, 16, dtype="float32"),
    "w4a8-g32-minimum": QuantScheme(
        "ABQGemm", "rtn", 4, 8, group_size=32, dtype="float32", has_minimum=True
    ),
    "w8a8-kv4": QuantScheme("ABQGemm", "rtn", 8, 8, dtype="float32", kv_bits=4),
    "qqq-kv8": QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True, dtype="float32", kv_bits=8),
    "mixed": SchemeMap(
        QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True, dtype="float32"),
        (
            Rule("down_proj", "w8a8"),
            Rule("layers.0.mlp.gate_up_proj", "w2ba8-g16"),
            Rule("layers.1.self_attn.*", "w4a16"),
        ),
    ),
}


@pytest.fixture(scope="module")
def exported(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The tiny model's onnx folder for a named scheme, made once."""
    cache: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in cache:
            cache[name] = export(tiny_model_dir, SCHEMES[name], tmp_path_factory.mktemp(name))
        return cache[name]

    return get


IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13]], np.int64)


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_equal_the_torch_reference(exported: Callable[[str], Path], name: str) -> None:
    import torch

    from calibration.reference.model import quantised_model

    folder = exported(name)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    with torch.no_grad():
        want = (
            quantised_model(read_quant(folder.parent / "quant"))(torch.from_numpy(IDS))
            .logits.float()
            .numpy()
        )
    assert logits.dtype == np.float32 and logits.shape == want.shape
    error = np.linalg.norm(logits - want) / np.linalg.norm(want)
    assert error < 2e-3, error  # both fp32: only a code on the edge of two roundings may differ


def test_logits_of_wanted_tokens_only(exported: Callable[[str], Path]) -> None:
    """Of each sequence of a batch its own, in the order asked for, one even twice."""
    decoder = Decoder(exported("w8a8"))
    ids, mask = np.concatenate([IDS, IDS[:, ::-1]]), np.ones((2, 11), np.int64)
    mask[0, :3] = 0
    every, past = decoder(feeds(ids, decoder.empty(2), mask))
    wanted = np.array([[10, 4, 4], [0, 9, 3]])
    some, same = decoder(feeds(ids, decoder.empty(2), mask, wanted))
    want = np.take_along_axis(every, wanted[..., None], 1)
    np.testing.assert_allclose(some, want, atol=1e-5 * np.abs(every).max())
    for name in past:
        np.testing.assert_array_equal(same[name], past[name])


@pytest.mark.parametrize("name", ["w8a8", "w8a8-kv4"])
def test_decoding_with_the_cache_equals_one_prefill(
    exported: Callable[[str], Path], name: str
) -> None:
    decoder = Decoder(exported(name))
    whole, _ = decoder(feeds(IDS, decoder.empty()))
    logits, past = decoder(feeds(IDS[:, :4], decoder.empty()))
    steps = [logits]
    for column in range(4, IDS.shape[1]):
        logits, past = decoder(feeds(IDS[:, column : column + 1], past))
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), whole, atol=2e-3 * np.abs(whole).max())
    assert next(iter(past.values())).shape[2] == IDS.shape[1]


def test_left_padding_changes_nothing(exported: Callable[[str], Path]) -> None:
    decoder = Decoder(exported("w8a8"))
    alone, _ = decoder(feeds(IDS, decoder.empty()))
    padded = np.concatenate([np.full((1, 5), 0), IDS], 1)
    other = np.random.default_rng(0).integers(0, 512, padded.shape)
    mask = np.ones((2, padded.shape[1]), np.int64)
    mask[0, :5] = 0
    logits, past = decoder(feeds(np.concatenate([padded, other]), decoder.empty(2), mask))
    np.testing.assert_allclose(logits[0, 5:], alone[0], atol=2e-3 * np.abs(alone).max())
    assert all(np.isfinite(array).all() for array in past.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_structure(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    folder = export(tiny_model_dir, QuantScheme("ABQGemm", "rtn", 4, 4, dtype=dtype), tmp_path)
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    custom = [node for node in model.graph.node if is_custom(node.domain)]
    assert [node.name for node in custom[:4]] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [node.domain for node in custom] == [
        "anybit",
        "anybit.v1",
    ] * 4  # with and without a norm
    assert [node.input[-1] for node in custom[::2]] == [
        f"model.layers.{i}.{norm}.weight"
        for i in range(2)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert [node.name for node in model.graph.node if node.op_type == "RMSNorm"] == ["model.norm"]
    ours = [node for node in model.graph.node if node.name.startswith("model.layers.1.")]
    assert [node.name.removeprefix("model.layers.1.") for node in ours] == [
        "self_attn.qkv_proj",
        "self_attn.heads",
        "self_attn.attention",
        "self_attn.o_proj",
        "residual",
        "mlp.gate_up_proj",
        "mlp.product",
        "mlp.down_proj",
        "output",
    ]
    for node in custom:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert attributes["plugin_namespace"] == b"anybit" and attributes["plugin_version"] == b"1"
    assert [(item.domain, item.name) for item in model.functions] == [
        ("anybit", "ABQGemm"),
        ("anybit.v1", "ABQGemm"),
        ("anybit_pointwise", "RotatedHeads"),
        ("anybit_attention", "CachedAttention"),
        ("anybit_pointwise", "ResidualSum"),
        ("anybit_pointwise", "Activation"),
        ("anybit_pointwise", "RMSNorm"),
    ]
    assert {item.overload for item in model.functions} == {""}
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    caches = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert names == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "logits_indices",
        *(f"past_key_values.{name}" for name in caches),
        "logits",
        *(f"present.{name}" for name in caches),
    ]
    assert {layer_output(0), layer_output(1)} <= {
        name for node in model.graph.node for name in node.output
    }
    assert sorted(path.name for path in folder.iterdir()) == [MODEL_FILE, DATA_FILE]
    inline = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    ]
    assert all(
        tensor.data_type == onnx.TensorProto.INT64 and len(tensor.raw_data) <= 64
        for tensor in inline
    )
    outputs = [name for node in model.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["qqq", "w3a16"])
def test_norms_apart_give_the_same_bits(
    tiny_model_dir: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    scheme = SCHEMES[name]
    assert isinstance(scheme, QuantScheme)
    folder = export(tiny_model_dir, replace(scheme, dtype=dtype), tmp_path)
    quant, apart = read_quant(tmp_path / "quant"), tmp_path / "apart"
    apart.mkdir()
    assert export_onnx(quant, apart, fuse_norms=False)["custom_nodes"] == 8
    nodes = onnx.load(apart / MODEL_FILE, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("RMSNorm") == 5
    assert {node.domain for node in nodes} == {"", "anybit", "anybit_attention", "anybit_pointwise"}
    outputs = []
    for path in (folder, apart):
        with OnnxSession(path, quant.config["max_position_embeddings"]) as session:
            outputs.append(session.run(IDS))
    np.testing.assert_array_equal(*outputs)


def test_a_norm_without_epsilon_stays_apart(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """An epsilon of 0 means no norm to a node."""
    folder = export(tiny_llama(rms_norm_eps=0.0), SCHEMES["w8a8"], tmp_path)
    nodes = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("RMSNorm") == 5


def test_tied_weights_stay_tied(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        folder = export(tiny_llama(tie_word_embeddings=tied), SCHEMES["w8a8"], tmp_path / str(tied))
        model = onnx.load(folder / MODEL_FILE, load_external_data=False)
        sizes[tied] = (folder / DATA_FILE).stat().st_size
        assert ("lm_head.weight" in [tensor.name for tensor in model.graph.initializer]) is not tied
    assert 0 <= sizes[False] - sizes[True] - 512 * 64 * 4 < 64


def test_biases_reach_the_graph(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    from calibration.reference.model import quantised_model

    folder = export(tiny_llama(attention_bias=True, mlp_bias=True), SCHEMES["w8a8"], tmp_path)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    with torch.no_grad():
        want = (
            quantised_model(read_quant(tmp_path / "quant"))(torch.from_numpy(IDS))
            .logits.float()
            .numpy()
        )
    assert np.linalg.norm(logits - want) / np.linalg.norm(want) < 2e-3


def test_same_input_same_bytes(exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = exported("qqq")
    export_onnx(read_quant(folder.parent / "quant"), tmp_path)
    for name in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_progress_counts_layers(exported: Callable[[str], Path], tmp_path: Path) -> None:
    from calibration.progress import NullProgress

    class Counter(NullProgress):
        total = done = 0

        def start(self, stage: str, total: int) -> None:
            self.total = total

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps

    counter: Any = Counter()
    export_onnx(read_quant(exported("w8a8").parent / "quant"), tmp_path, counter)
    assert counter.total == counter.done == 3
