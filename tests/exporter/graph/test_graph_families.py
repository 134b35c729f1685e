"""Families that are one file each, exported and run in stock ONNX Runtime, against transformers with
the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.families import steps
from calibration.progress import NullProgress
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import float_model, quantised_model
from exporter.graph.decoder import MODEL_FILE, export_onnx
from exporter.graph.steps import WRITERS
from exporter.run.native import NativeSession, native_library
from exporter.run.onnxruntime import OnnxSession, onnx_runner
from plugins.cached_attention import OP as ATTENTION
from plugins.pointwise.forms import ACTIVATIONS
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import Decoder, export, feeds

pytestmark = pytest.mark.usefixtures("more_families")

IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13, 510, 8, 77, 21]], np.int64)
TOLERANCE = 1e-4
Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """get(name, dtype="float32") -> (float model, onnx folder) of a tiny model in W8A16."""
    cache: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(name: str, dtype: str = "float32") -> tuple[Path, Path]:
        if (name, dtype) not in cache:
            model = tiny_llama(architecture=name, **FAMILIES[name])
            scheme = QuantScheme("ABQGemm", "rtn", 8, 16, dtype=dtype)
            cache[name, dtype] = model, export(model, scheme, tmp_path_factory.mktemp(name))
        return cache[name, dtype]

    return get


def reference(model: Path, folder: Path, **changes: Any) -> Any:
    """The transformers model with the weights that the codes stand for."""
    found = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", **changes
    ).eval()
    quant = read_quant(folder.parent / "quant")
    state = found.state_dict()
    for name in quant.decoder.linears:
        info = quant.decoder.infos[f"{name}.weight"]
        weight = torch.from_numpy(quant.linear(name).dequantize())
        state[info.module][info.place].copy_(weight)
    return found


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Of one call without a cache."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        made = model(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return np.asarray(made.logits.numpy())


def test_every_step_and_activation_has_a_writer() -> None:
    assert set(WRITERS) == set(get_args(steps.Step))
    assert set(ACTIVATIONS) == set(steps.ACTIVATIONS.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill(exported: Exported, name: str) -> None:
    model, folder = exported(name)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    want = logits_of(reference(model, folder), IDS)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE, rtol=0)
    assert want.std() > 0.1  # a difference of TOLERANCE is a small one


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_with_the_cache(exported: Exported, name: str) -> None:
    model, folder = exported(name)
    decoder = Decoder(folder)
    logits, past = decoder(feeds(IDS[:, :4], decoder.empty()))
    parts = [logits]
    for columns in (slice(4, 5), slice(5, 6), slice(6, 11), *(slice(i, i + 1) for i in (11, 12))):
        logits, past = decoder(feeds(IDS[:, columns], past))
        parts.append(logits)
    want = logits_of(reference(model, folder), IDS[:, :13])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_left_padded_batch(exported: Exported, name: str) -> None:
    model, folder = exported(name)
    decoder = Decoder(folder)
    ids = np.random.default_rng(0).integers(0, 512, (3, 14))
    mask = np.ones_like(ids)
    mask[0, :5], mask[1, :9] = 0, 0
    logits, past = decoder(feeds(ids, decoder.empty(3), mask))
    new, wider = ids[:, ::7], np.concatenate([mask, np.ones((3, 2), np.int64)], 1)
    more, past = decoder(feeds(new, past, wider))
    want = logits_of(reference(model, folder), np.concatenate([ids, new], 1), wider)
    seen = wider > 0
    np.testing.assert_allclose(
        np.concatenate([logits, more], 1)[seen], want[seen], atol=TOLERANCE, rtol=0
    )
    assert all(np.isfinite(array).all() for array in past.values())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma2", {"sliding_window": 7}),
        ("Gemma2", {"sliding_window": 5}),
        ("Gemma2", {"attn_logit_softcapping": None}),
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Gemma2", {"query_pre_attn_scalar": 10}),
        ("Gemma2", {"hidden_activation": "silu"}),
        ("Granite", {"residual_multiplier": 0.23}),
        ("Granite", {"embedding_multiplier": 12.5}),
        ("Granite", {"attention_multiplier": 0.25}),
        ("Arcee", {"hidden_act": "silu"}),
    ],
)
def test_these_tests_would_notice(exported: Exported, name: str, changes: dict[str, Any]) -> None:
    model, folder = exported(name)
    right, wrong = (logits_of(reference(model, folder, **which), IDS) for which in ({}, changes))
    assert np.abs(right - wrong).max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_16_bit_file_as_it_is_gives_the_bits_of_the_rounded_graph(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """With native kernels on both sides. A float head's scores are not rounded to the model's type, and
    softcaps would show it.
    """
    uncapped = {"final_logit_softcapping": None} if name.startswith("Gemma") else {}
    model = tiny_llama(architecture=name, **FAMILIES[name] | uncapped)
    folder = export(model, QuantScheme("ABQGemm", "rtn", 8, 8, dtype="float16"), tmp_path)
    library = native_library()
    assert isinstance(library, Path)
    with (
        NativeSession(folder, 256, "float16") as plain,
        OnnxSession(folder, 256, (), "float16", library) as rounded,
    ):
        for ids in (IDS, IDS[:, :1], IDS[:, 3:7]):
            got, want = plain.run(ids), rounded.run(ids)
            np.testing.assert_array_equal(got.astype(np.float16), want)


@pytest.mark.parametrize("fuse_norms", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_structure(exported: Exported, name: str, fuse_norms: bool, tmp_path: Path) -> None:
    _, folder = exported(name)
    quant = read_quant(folder.parent / "quant")
    export_onnx(quant, tmp_path, fuse_norms=fuse_norms)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=True)
    graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph
    outputs = [output for node in graph.node for output in node.output]
    assert len(outputs) == len(set(outputs))
    norms = [node.input[1] for node in graph.node if node.op_type == "RMSNorm"]
    heads = [node for node in graph.node if node.op_type == "RotatedHeads"]
    norms += [name for node in heads for name in node.input if name.endswith("norm.weight")]
    fused = {
        block.name(site.norm.gain)
        for block in quant.decoder.blocks
        for site in block.sites.values()
        if site.norm
    }
    gains = [
        *(block.name(norm.gain) for block in quant.decoder.blocks for norm in block.norms),
        quant.decoder.head.norm.gain,
    ]
    assert sorted(norms) == sorted(set(gains) - fused if fuse_norms else gains)
    tensors = [tensor.name for tensor in graph.initializer]
    assert sorted(gains) == sorted(set(gains) & set(tensors)) and len(tensors) == len(set(tensors))
    read = {name for node in graph.node for name in node.input}
    made = {value.name for value in graph.output}
    assert set(tensors) <= read and set(outputs) - read <= made  # nothing is there for nothing


def masks_of(graph: onnx.GraphProto) -> list[str]:
    """Which mask each layer's attention reads."""
    return [node.input[5] for node in graph.node if node.op_type == ATTENTION]


def test_one_mask_for_each_window(exported: Exported) -> None:
    graph = onnx.load(exported("Gemma2")[1] / MODEL_FILE, load_external_data=False).graph
    assert masks_of(graph) == ["mask.window6", "mask"]
    plain = onnx.load(exported("Qwen3")[1] / MODEL_FILE, load_external_data=False).graph
    names = [node.name for node in plain.node if node.name.startswith("mask")]
    assert [node.name for node in graph.node if node.name in names] == names
    assert not any("window" in name for name in names)


def test_a_window_without_a_softcap_is_an_attention_node(
    exported: Exported, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = tiny_llama(architecture="Qwen3", **FAMILIES["Qwen3"], **sizes)
    folder = export(model, QuantScheme("ABQGemm", "rtn", 8, 16, dtype="float32"), tmp_path)
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    assert masks_of(graph) == ["mask", "mask.window5"]
    decoder = Decoder(folder)
    logits, past = decoder(feeds(IDS[:, :8], decoder.empty()))
    more, _ = decoder(feeds(IDS[:, 8:], past))
    want = logits_of(reference(model, folder), IDS)
    np.testing.assert_allclose(np.concatenate([logits, more], 1), want, atol=TOLERANCE, rtol=0)
    other = logits_of(reference(model, folder, sliding_window=6), IDS)
    assert np.abs(want - other).max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["Qwen3", "Olmo2"])
def test_heads_that_are_turned_before_they_are_normed(
    exported: Exported, tmp_path: Path, name: str
) -> None:
    """One node makes and turns the heads, others norm them: per head, and over all heads."""
    quant = read_quant(exported(name)[1].parent / "quant")
    blocks = []
    for block in quant.decoder.blocks:
        order = list(block.steps)
        place = next(i for i, step in enumerate(order) if isinstance(step, steps.HeadNorm))
        order[place : place + 2] = order[place + 1], order[place]
        blocks.append(replace(block, steps=tuple(order)))
    quant.decoder = replace(quant.decoder, blocks=tuple(blocks))
    export_onnx(quant, tmp_path)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=True)
    decoder = Decoder(tmp_path)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    with torch.no_grad():
        want = quantised_model(quant)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=TOLERANCE, rtol=0)
    graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph
    keys = {output for node in graph.node for output in node.output if output.endswith("attn.key")}
    assert len(keys) == len(blocks)


LONG = {**FAMILIES["Phi3"], "sliding_window": None, "original_max_position_embeddings": 12}
NOTE = (
    "onnx: positions for 256 tokens are those of longrope's long texts from the first token on; "
    "transformers takes them beyond 12 tokens. --max-seq 12 takes those of short texts."
)


class Said(NullProgress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)


@pytest.mark.parametrize(("context", "length"), [(256, 15), (12, 12)])
def test_longrope_has_the_frequencies_of_its_context(
    tiny_llama: Callable[..., Path], tmp_path: Path, context: int, length: int
) -> None:
    model = tiny_llama(architecture="Phi3", **LONG)
    folder = export(model, QuantScheme("ABQGemm", "rtn", 8, 16, dtype="float32"), tmp_path)
    said, quant, ids = Said(), read_quant(tmp_path / "quant"), IDS[:, :length]
    export_onnx(quant, folder, said, max_context=context)
    assert said.warnings == ([NOTE] if context > 12 else [])
    decoder, other = Decoder(folder), quantised_model(quant, max_context=context)
    logits, _ = decoder(feeds(ids, decoder.empty()))
    want = logits_of(reference(model, folder), ids)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE, rtol=0)
    found = other(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, want, atol=TOLERANCE, rtol=0)
    # Fewer tokens turn as in an export for this context, and not as transformers has them.
    short, _ = decoder(feeds(ids[:, :5], decoder.empty()))
    given = float_model(open_checkpoint(str(model), True), context).model.rotary_emb
    frequencies, factor = quant.rope(quant.decoder.ropes[0], context)
    np.testing.assert_array_equal(given.original_inv_freq, frequencies)
    assert factor == given.attention_scaling > 1
    apart = np.abs(short - logits_of(reference(model, folder), ids[:, :5])).max()
    assert (apart > 20 * TOLERANCE) == (context > 12)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sixteen_bits_stay_near(exported: Exported, name: str, dtype: str, bits: int) -> None:
    model, folder = exported(name, dtype)
    with OnnxSession(
        folder, read_quant(folder.parent / "quant").config["max_position_embeddings"]
    ) as session:
        logits = session.run(IDS)
    want = logits_of(reference(model, folder), IDS)
    error = np.linalg.norm(logits - want) / np.linalg.norm(want)
    assert 0 < error < 16 * 2.0**-bits


# ---------------------------------------------------------------- where 16-bit graphs round


def watched(folder: Path, *names: str) -> dict[str, Tensor]:
    """Inner tensors, and the model's outputs, of one call, as fp32."""
    runner = onnx_runner(folder, names)
    with runner:
        inputs = runner.get_input_metadata()
        past = {
            name: np.zeros((1, meta.shape[1], 0, meta.shape[3]), meta.dtype)
            for name, meta in inputs.items()
            if name.startswith("past")
        }
        found = runner.infer(feeds(IDS, past), check_inputs=False)
        return {name: torch.from_numpy(np.array(found[name], np.float32)) for name in found}


def fp32(x: Tensor) -> Tensor:
    """Rounded to fp32, to go on in fp64."""
    return x.float().double()


SIXTEEN = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@SIXTEEN
def test_capped_attention_rounds_scores_weights_and_context(exported: Exported, dtype: str) -> None:
    _, folder = exported("Gemma2", dtype)
    module = "model.layers.0.self_attn"
    names = [f"{module}.{end}" for end in ("query", "context")]
    found = watched(folder, *names)
    query, context = (found[name].double() for name in names)
    key, value = (
        found[f"present.0.{kind}"].double().repeat_interleave(2, 1) for kind in ("key", "value")
    )

    def rounded(x: Tensor) -> Tensor:
        return x.float().to(getattr(torch, dtype)).double()

    scores = rounded(query @ key.transpose(2, 3))
    scale, cap = (torch.tensor(number, dtype=torch.float32) for number in (9**-0.5, 2.0))
    ratio = (scale / cap).double()
    capped = fp32(fp32(torch.tanh(fp32(scores * ratio))) * cap)
    positions = torch.arange(IDS.shape[1])
    far = positions[:, None] - positions
    capped = capped.masked_fill((far < 0) | (far >= 6), -torch.inf)
    weights = rounded(fp32(capped.softmax(-1)))
    assert torch.equal(context, rounded(weights @ value).transpose(1, 2).flatten(2))


@SIXTEEN
@pytest.mark.parametrize(
    ("name", "nodes"),
    [("Gemma2", ("gate_up_proj.output", "product")), ("Arcee", ("up_proj.output", "activation"))],
)
def test_activations_round_once(
    exported: Exported, name: str, nodes: tuple[str, str], dtype: str
) -> None:
    before, after = (f"model.layers.0.mlp.{node}" for node in nodes)
    found = watched(exported(name, dtype)[1], before, after)
    kind, x = getattr(torch, dtype), found[before].double()
    if name == "Gemma2":
        gate, up = x.chunk(2, -1)
        want = F.gelu(gate, approximate="tanh").float().to(kind).double() * up
    else:
        want = F.relu(x).square()
    assert torch.equal(found[after], want.float().to(kind).float())


@SIXTEEN
def test_a_multiplier_is_fp32_and_the_sum_rounds(exported: Exported, dtype: str) -> None:
    layer, kind = "model.layers.0", getattr(torch, dtype)
    names = ("mlp.down_proj.output", "residual", "output")
    found = watched(exported("Granite", dtype)[1], *(f"{layer}.{name}" for name in names))
    value, before, after = (found[f"{layer}.{name}"] for name in names)
    scaled = (value * 0.22).to(kind).float()
    assert torch.equal(after, (before + scaled).to(kind).float())


@SIXTEEN
def test_an_embeddings_scale_is_of_the_models_type(exported: Exported, dtype: str) -> None:
    _, folder = exported("Granite", dtype)
    rows = "model.embed_tokens"
    found = watched(folder, rows, f"{rows}.scaled")
    constants = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer
    numbers = [constant for constant in constants if constant.name == f"number.{dtype}.12.3"]
    assert len(numbers) == 1
    scale = torch.tensor(12.3).to(getattr(torch, dtype)).float()
    want = (found[rows] * scale).to(getattr(torch, dtype)).float()
    assert torch.equal(found[f"{rows}.scaled"], want)


@SIXTEEN
def test_capped_logits_are_fp32(exported: Exported, dtype: str) -> None:
    found = watched(exported("Gemma2", dtype)[1], "lm_head")
    inner = fp32(found["lm_head"].double() * fp32(torch.tensor(1 / 3, dtype=torch.float64)))
    want = fp32(fp32(torch.tanh(inner)) * 3.0)
    torch.testing.assert_close(found["logits"].double(), want, rtol=0, atol=0)
    kept = found["logits"].to(getattr(torch, dtype)).float()
    assert not torch.equal(found["logits"], kept)
