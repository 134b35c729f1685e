"""Models whose codes were kept from a checkpoint, exported and run in stock ONNX Runtime, against
transformers with the dequantized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.out.layout import DATA_FILE
from calibration.progress import NullProgress
from calibration.quant.folder import read_quant
from calibration.quant.keep import Keeping, kept_schemes
from calibration.reference.model import float_model, quantised_model
from exporter.graph.decoder import MODEL_FILE
from exporter.proof.runners import gemm_nodes
from exporter.proof.swaps import Swap, Swapped
from exporter.proof.validate import ValidateOptions, validate
from exporter.proof.weights import compare_weights
from tests.calibration.formats import written
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import Decoder, export, feeds

IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13, 510, 8, 77, 21]], np.int64)


def kept(folder: Path, to: Path, **asked: Any) -> Path:
    """The onnx folder of an export in `to`."""
    checkpoint = open_checkpoint(str(folder), offline=True)
    return export(folder, kept_schemes(checkpoint, Keeping(dtype="float32", **asked)), to)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_logits_are_those_of_the_dequantized_model(
    tiny_llama: Callable[..., Path], tmp_path: Path, family: str, ordered: bool
) -> None:
    import torch

    sizes = FAMILIES.get(family, {}) | {"num_hidden_layers": 2}
    source = tiny_llama(architecture=family, dtype="float16", **sizes)
    made = written.gptq(source, tmp_path / "model", group=16, symmetric=False, ordered=ordered)
    folder = kept(made.folder, tmp_path)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    model = float_model(open_checkpoint(str(made.folder), offline=True))
    with torch.no_grad():
        want = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    gathers = [
        node
        for node in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node
        if node.op_type == "Gather" and node.name.endswith(".order.rows")
    ]
    assert len(gathers) == (8 if ordered else 0)


@pytest.mark.parametrize(("family", "ordered"), [("Mixtral", True), ("Qwen3Moe", False)])
def test_codes_of_experts(
    tiny_llama: Callable[..., Path], tmp_path: Path, family: str, ordered: bool
) -> None:
    """Every expert has an order of channels of its own, the first one none."""
    import torch

    source = tiny_llama(architecture=family, dtype="float16", **FAMILIES[family])
    made = written.gptq(source, tmp_path / "model", group=16, symmetric=False, ordered=ordered)
    assert sum(".experts." in name for name in made.weights) > 20
    folder = kept(made.folder, tmp_path)
    decoder, quant = Decoder(folder), read_quant(tmp_path / "quant")
    orders = {tuple(quant.order(name)) for name in quant.decoder.routed & {*quant.decoder.orders}}
    assert len(orders) == (2 * 4 if ordered else 0)  # two nodes of each expert but the first
    for name, weight in made.weights.items():
        order = quant.order(name)
        found = weight if order is None else weight[:, order]
        np.testing.assert_array_equal(quant.linear(name).dequantize(), found)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    assert {node.name for node in gemm_nodes(model, quant.decoder)} > {*quant.decoder.nodes}
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    reference = float_model(open_checkpoint(str(made.folder), offline=True))
    with torch.no_grad():
        want = reference(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    rounded = quantised_model(quant)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(rounded, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("Qwen2", ("o_proj", "q_proj", "k_proj", "v_proj")),
        ("Mixtral", ("w2",)),
        ("Phi3", ("gate_up_proj",)),
    ],
)
def test_nodes_that_a_checkpoint_has_in_floating_point(
    tiny_llama: Callable[..., Path], tmp_path: Path, family: str, left_out: tuple[str, ...]
) -> None:
    """They are a MatMul of each linear, with its bias; the torch reference and the weights' proof have
    them too.
    """
    import torch

    sizes = FAMILIES.get(family, {}) | {"num_hidden_layers": 1}
    source = tiny_llama(architecture=family, dtype="float16", **sizes)
    made = written.gptq(source, tmp_path / "model", group=16, symmetric=False, left_out=left_out)
    path, random = made.folder / "model.safetensors", np.random.default_rng(6)
    tensors = {
        name: random.standard_normal(array.shape).astype(np.float16)
        if name[-5:] == ".bias"
        else array
        for name, array in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    folder = kept(made.folder, tmp_path)
    checkpoint, quant = (
        open_checkpoint(str(made.folder), offline=True),
        read_quant(tmp_path / "quant"),
    )
    fused = {"gate_proj", "up_proj"} if family == "Phi3" else {*left_out}
    assert {name.rpartition(".")[2] for name in quant.decoder.floats} == fused
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    with torch.no_grad():
        want = float_model(checkpoint)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    rounded = quantised_model(quant)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(rounded, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    compared = [node.name for node in gemm_nodes(model, quant.decoder) if not node.router]
    assert compared == [*quant.decoder.products] and {*compared} > {*quant.decoder.nodes}
    assert all(row.ok for row in compare_weights(checkpoint, quant))


def test_a_changed_weight_in_floating_point_is_found(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    made = written.gptq(source, tmp_path / "model", left_out=("o_proj",))
    folder = kept(made.folder, tmp_path, abits=8)
    name = "model.layers.0.self_attn.o_proj"
    tensors = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer
    (place,) = (one.external_data for one in tensors if one.name == f"{name}.weight")
    offset = next(int(item.value) for item in place if item.key == "offset")
    weight = np.memmap(folder / DATA_FILE, np.float32, "r+", offset, (64, 64))
    weight[3, 5] += 1
    weight.flush()
    result = validate(tmp_path, ValidateOptions(tokens=12, steps=0))
    assert (
        f"in output channel 3 at {name} given its inputs (export, prefill: " in result.first_failure
    )


def test_eight_bit_activations_in_an_order_of_their_own(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """The torch reference and the graph round the same channels alike."""
    import torch

    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    made = written.gptq(source, tmp_path / "model", ordered=True)
    folder = kept(made.folder, tmp_path, abits=8)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    want = quantised_model(read_quant(tmp_path / "quant"))(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)


def test_nodes_in_an_order_of_their_own_go_back_to_floats(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Attribution puts the checkpoint's weights into the codes' order, beside a node that has none."""
    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    made = written.gptq(source, tmp_path / "model", ordered=True, left_out=("o_proj",))
    kept(made.folder, tmp_path, abits=4)
    checkpoint, quant = (
        open_checkpoint(str(made.folder), offline=True),
        read_quant(tmp_path / "quant"),
    )
    nodes = frozenset(quant.decoder.nodes)
    model = Swapped(quant, checkpoint, IDS, IDS, 256, NullProgress())
    swaps = [Swap(), Swap(weights=nodes), Swap(weights=nodes, activations=nodes)]
    as_is, weights, everything = (
        found.means("it")["kl"] for found in model.measure(swaps, NullProgress())
    )
    assert as_is == pytest.approx(weights) and as_is > 1e-4 and everything < 1e-9


def test_the_proof_of_kept_weights_allows_no_difference(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    made = written.gptq(source, tmp_path / "model", ordered=True)
    kept(made.folder, tmp_path)
    checkpoint, quant = (
        open_checkpoint(str(made.folder), offline=True),
        read_quant(tmp_path / "quant"),
    )
    rows = compare_weights(checkpoint, quant)
    assert all(row.ok for row in rows)
    assert {row.max_abs for row in rows if row.tensor.endswith("_proj")} == {0.0}
    name = "model.layers.0.mlp.up_proj"
    linear = quant.linear(name)
    scale = linear.arrays.scale.copy()
    scale[7, 1] = np.nextafter(scale[7, 1], np.float32(1))  # the last bit of one scale
    object.__setattr__(linear.arrays, "scale", scale)
    find = quant.linear
    quant.linear = lambda wanted: linear if wanted == name else find(wanted)  # type: ignore[method-assign]
    assert [row.tensor for row in compare_weights(checkpoint, quant) if not row.ok] == [name]
