"""Families that are one file of data each, through all that calibration does with a decoder: read,
run, rotate, smooth, train, measure; and the whole way to a proven ONNX file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calibration.blocks.forward import block_output, float_linear, load_block
from calibration.blocks.rounding import RoundingMethod
from calibration.budget.sensitivity import Measurement, measure
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.families.decoder import Block, Family, UnsupportedError
from calibration.families.llama import block as llama_steps
from calibration.families.steps import Add, Heads, Linear, Linears, Norm
from calibration.methods.abq.transforms import EquivalentTransform, TransformParts
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import FloatReference, float_model
from calibration.reference.steps import Rope
from calibration.settings import CalibrationSettings
from calibration.transforms.rotation import Rotation, obstacle, orthogonal
from calibration.transforms.smoothing import fold_scales, smoothed_sites
from exporter.__main__ import main
from plugins.errors import InputError
from tests.calibration.block_cases import float_logits, tokens
from tests.calibration.llama import llama
from tests.conftest import FAMILIES, TINY_CONFIG

pytestmark = pytest.mark.usefixtures("more_families")

IDS = tokens(2, 24)
BEHIND = (
    "model.layers.0.post_attention_layernorm, behind model.layers.0.self_attn.o_proj, "
    "does not commute with it"
)
WITHOUT = "model.layers.0.self_attn.qkv_proj reads the residual stream without a norm"
OBSTACLES = {"Gemma2": BEHIND, "Gemma3": BEHIND, "Olmo2": WITHOUT, "Olmo3": WITHOUT}
ROTATED = FAMILIES.keys() - OBSTACLES.keys()  # the others have norms behind their linears
# What takes the scales of each node's input in.
LIKE_LLAMA = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
OLMO = [None, "self_attn.v_proj", None, "mlp.up_proj"]
SOURCES = dict.fromkeys(FAMILIES, LIKE_LLAMA) | {
    "Arcee": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", None],
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Mixtral": [
        *LIKE_LLAMA[:2],
        *(
            source
            for expert in range(5)
            for source in (None, f"block_sparse_moe.experts.{expert}.w3")
        ),
    ],
    "Olmo2": OLMO,
    "Olmo3": OLMO,
}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a family."""
    return str(request.param)


@pytest.fixture
def checkpoint(tiny_llama: Callable[..., Path], name: str) -> Checkpoint:
    """A tiny random model of the family."""
    return open_checkpoint(str(tiny_llama(architecture=name, **FAMILIES[name])), offline=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_steps_are_transformers(checkpoint: Checkpoint) -> None:
    folder = checkpoint.source.path
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    want = model(IDS).logits
    torch.testing.assert_close(float_logits(checkpoint, IDS), want, atol=1e-4, rtol=0)
    found = FloatReference(float_model(checkpoint))
    torch.testing.assert_close(found(IDS).logits, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.head(found.hidden(IDS)), want, atol=1e-4, rtol=0)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_rotation_keeps_the_function_of_the_values_alone_where_it_must(
    checkpoint: Checkpoint, name: str
) -> None:
    settings = CalibrationSettings(method=QqqSettings())
    method = RoundingMethod(lambda *arguments: None)
    if name not in ROTATED:
        assert obstacle(checkpoint.decoder) == OBSTACLES[name]
        with pytest.raises(InputError) as caught:
            method.basis(checkpoint, settings)
        assert str(caught.value) == (
            f"rotation=hadamard: got a decoder whose residual stream cannot be rotated "
            f"({OBSTACLES[name]}), expected norm, linears and sum in every branch. "
            f"Add --set rotation=values, which rotates value heads alone, or rotation=none."
        )
        settings = CalibrationSettings(method=QqqSettings(rotation="values"))
    basis = method.basis(checkpoint, settings)
    assert isinstance(basis, Rotation) and (basis.residual is None) == (name not in ROTATED)
    want = float_logits(checkpoint, IDS)
    torch.testing.assert_close(
        float_logits(checkpoint, IDS, basis), want, atol=1e-4 * want.abs().max(), rtol=0
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_scales_fold_into_what_is_in_front(checkpoint: Checkpoint, name: str) -> None:
    block = checkpoint.decoder.blocks[1]
    rope = Rope.of(checkpoint, 24, step=block.rope)
    sources = [site.source.name if site.source else None for site in block.sites.values()]
    assert sources == SOURCES[name]
    weights, x = load_block(checkpoint, 1), torch.randn(2, 24, checkpoint.decoder.hidden)
    want = block_output(x, weights, float_linear(weights, block), block, rope)
    sites = smoothed_sites("all", block)
    assert [block.sites[node].source is not None for node in block.sites] == [
        node in sites for node in block.sites
    ]
    absmax = {node: torch.rand(block.sites[node].linears.in_features) + 0.5 for node in sites}
    transform = EquivalentTransform(weights, block, absmax, TransformParts())
    assert transform.sites == sites
    for folded in (
        transform.apply_to(weights),
        fold_scales(weights, transform.columns(), block),
    ):
        found = block_output(x, folded, float_linear(folded, block), block, rope)
        assert (found - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_fields_that_a_config_leaves_out_are_transformers_defaults(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(architecture=name), folder)
    want = open_checkpoint(str(folder), True).decoder.declaration()
    path, kept = folder / "config.json", {"architectures", "model_type", *TINY_CONFIG}
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in kept}))
    checkpoint = open_checkpoint(str(folder), True)
    assert checkpoint.decoder.declaration() == want
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(float_logits(checkpoint, IDS), model(IDS).logits, atol=1e-4, rtol=0)


def test_sensitivity_is_measured_for_every_node(checkpoint: Checkpoint) -> None:
    schemes = tuple(QuantScheme("ABQGemm", "rtn", bits, 8) for bits in (2, 8))
    job = Measurement(checkpoint, CalibrationSettings(), schemes, IDS.numpy())
    costs = measure(job)
    assert list(costs) == list(checkpoint.decoder.nodes)
    assert all(coarse > fine > 0 for coarse, fine in costs.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--wbits", "4", "--abits", "8", "--set", "smooth=all"),
        ("--wbits", "2b", "--abits", "8", "--group-size", "16", "--set", "epochs=1"),
    ],
    ids=["qqq", "abq, trained"],
)
def test_the_whole_way_is_proven(
    checkpoint: Checkpoint, name: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """Calibrated, exported, and every layer compared with torch, and with transformers' model."""
    rotation = () if name in ROTATED else ("--set", "rotation=values")
    out = tmp_path / "out"
    command = [str(checkpoint.source.path), *arguments, *rotation, "--kv-bits", "8"]
    command += ["--nsamples", "3", "--seqlen", "48", "--out", str(out), "--engine", "none"]
    assert main([*command, "--offline", "--progress", "none"]) == 0
    report = json.loads((out / "report" / "report.json").read_text())["validation"]
    assert report["ok"] and not report["first_failure"]
    levels = {row["level"] for row in report["rows"]}
    assert levels == {"weights", "export", "native", "quantisation"}
    worst = {
        row["tensor"]: row["snr_db"]
        for row in report["rows"]
        if row["level"] == "quantisation" and row["phase"] == "prefill"
    }
    assert len(worst) == checkpoint.decoder.layers + 1 and (
        arguments[1] != "4" or min(worst.values()) > 5
    ), worst


def test_a_bad_block_is_named(checkpoint: Checkpoint) -> None:
    block: Any = checkpoint.decoder.blocks[0]
    with pytest.raises(ValueError, match="expected branches of linears that each end in an Add"):
        replace(block, steps=block.steps[:-1])


def fused(config: Any, index: int) -> tuple[Any, ...]:
    """LLaMA's block with queries, keys and values in one linear, as Phi-3's checkpoints have it."""
    first, stacked, *rest = llama_steps(config, index)
    one = Linear("self_attn.qkv_proj", stacked.out_features, stacked.in_features)
    return (first, replace(stacked, members=(one,)), *rest)


def test_values_that_are_no_linear_of_their_own_take_no_scales_and_no_rotation() -> None:
    decoder = Family("fused", "Fused", "fused", fused).decoder(llama(1).config.values)
    assert decoder.blocks[0].sites["self_attn.o_proj"].source is None
    assert obstacle(decoder) == (
        "model.layers.0.self_attn.o_proj reads values that are no linear of their own"
    )
    assert "self_attn.o_proj" not in smoothed_sites("all", decoder.blocks[0])


def test_a_branch_of_one_linear_is_rotated_on_both_sides() -> None:
    block = Block(
        0, "layer", (Norm("norm", 8, 1e-5), Linears("node", (Linear("one", 8, 8),)), Add())
    )
    generator = torch.Generator().manual_seed(0)
    weights = {"norm.weight": torch.rand(8) + 0.5, "one.weight": torch.randn(8, 8)}
    rotation = Rotation(orthogonal(8, generator), orthogonal(4, generator))
    rotated, x = rotation.block(weights, block), torch.randn(1, 5, 8)
    still = Rope(torch.ones(5, 4), torch.zeros(5, 4))
    want = block_output(x, weights, float_linear(weights, block), block, still)
    turned = x @ rotation.residual.float()
    found = block_output(turned, rotated, float_linear(rotated, block), block, still)
    torch.testing.assert_close(found, want @ rotation.residual.float(), atol=1e-5, rtol=1e-5)


def test_blocks_that_make_no_sense_are_told() -> None:
    steps = list(llama(1).blocks[0].steps)
    place = next(number for number, step in enumerate(steps) if isinstance(step, Heads))
    with pytest.raises(ValueError, match="Heads cut 192 values, but get 128 of them"):
        Block(0, "layer", (*steps[:place], Heads(4, 4, 16), *steps[place + 1 :]))
    with pytest.raises(
        UnsupportedError, match="got num_key_value_heads 0, expected a whole number"
    ):
        llama(1, num_key_value_heads=0)
    with pytest.raises(UnsupportedError, match="got layers with different heads"):
        replace(llama(2), blocks=(llama(2).blocks[0], llama(1, num_key_value_heads=4).blocks[0]))


def test_what_a_family_says_is_part_of_what_results_depend_on() -> None:
    assert llama(2).declaration() == llama(2).declaration()
    assert llama(2).declaration() != llama(2, rms_norm_eps=1e-6).declaration()


def test_a_checkpoint_written_back_has_the_gains_as_it_stores_them(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(architecture="Gemma2", **FAMILIES["Gemma2"])
    out = tmp_path / "out"
    command = [str(folder), "--wbits", "8", "--abits", "8", "--method", "rtn", "--out", str(out)]
    command += ["--format", "compressed-tensors", "--dtype", "float32", "--until", "quant"]
    assert main([*command, "--offline", "--progress", "none"]) == 0
    name = "model.layers.0.post_feedforward_layernorm.weight"
    stored = load_file(next(folder.glob("*.safetensors")))[name]
    written = load_file(next((out / "quant" / "compressed-tensors").glob("*.safetensors")))[name]
    torch.testing.assert_close(written, stored, atol=1e-6, rtol=0)
