"""Families that are one file of data each, through all that calibration does with a decoder: read,
run, rotate, smooth, train, measure; and the whole way to a proven ONNX file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibration.blocks.forward import block_output, embedded, float_linear, load_block
from calibration.blocks.rounding import Plain, RoundingMethod
from calibration.budget.sensitivity import Measurement, measure
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.methods.abq.transforms import EquivalentTransform, TransformParts
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import FloatReference, float_model
from calibration.reference.steps import PLAIN, Rope
from calibration.settings import CalibrationSettings
from calibration.transforms.rotation import Rotation, obstacle
from calibration.transforms.smoothing import fold_scales, smoothed_sites
from exporter.__main__ import main
from plugins.errors import InputError
from tests.calibration.block_cases import tokens
from tests.conftest import FAMILIES

pytestmark = pytest.mark.usefixtures("more_families")

IDS = tokens(2, 24)
ROTATED = ("Arcee", "Granite", "Qwen3")  # the others have norms behind their linears
OBSTACLES = {
    "Gemma2": "model.layers.0.post_attention_layernorm, behind model.layers.0.self_attn.o_proj, "
    "does not commute with it",
    "Olmo2": "model.layers.0.self_attn.qkv_proj reads the residual stream without a norm",
}
# What takes the scales of each node's input in.
SOURCES = {
    "Arcee": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", None],
    "Gemma2": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "Granite": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "Olmo2": [None, "self_attn.v_proj", None, "mlp.up_proj"],
    "Qwen3": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a family."""
    return str(request.param)


@pytest.fixture
def checkpoint(tiny_llama: Callable[..., Path], name: str) -> Checkpoint:
    """A tiny random model of the family."""
    return open_checkpoint(str(tiny_llama(architecture=name, **FAMILIES[name])), offline=True)


def logits(checkpoint: Checkpoint, basis: Plain | Rotation) -> Tensor:
    """The float model, step by step."""
    decoder, rope = checkpoint.decoder, Rope.of(checkpoint, IDS.shape[1])
    x = embedded(basis.tensor(checkpoint, f"{decoder.embedding.name}.weight"), IDS, decoder)
    for block in decoder.blocks:
        weights = basis.load(checkpoint, block.index)
        x = block_output(x, weights, float_linear(weights, block), block, rope)
    head = decoder.head
    tied = decoder.tied and not basis.unties
    table = basis.tensor(checkpoint, f"{(decoder.embedding if tied else head).name}.weight")
    scores = PLAIN.norm(x, head.norm, basis.tensor(checkpoint, head.norm.gain)) @ table.T
    return scores if head.softcap is None else PLAIN.softcap(scores, head.softcap)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_steps_are_transformers(checkpoint: Checkpoint) -> None:
    folder = checkpoint.source.path
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    want = model(IDS).logits
    torch.testing.assert_close(logits(checkpoint, Plain()), want, atol=1e-4, rtol=0)
    found = FloatReference(float_model(checkpoint))
    torch.testing.assert_close(found(IDS).logits, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.head(found.hidden(IDS)), want, atol=1e-4, rtol=0)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_rotation_keeps_the_function_or_is_refused(checkpoint: Checkpoint, name: str) -> None:
    settings = CalibrationSettings(method=QqqSettings())
    method = RoundingMethod(lambda *arguments: None)
    if name not in ROTATED:
        assert obstacle(checkpoint.decoder) == OBSTACLES[name]
        with pytest.raises(InputError) as caught:
            method.basis(checkpoint, settings)
        assert str(caught.value) == (
            f"rotation=hadamard: got a decoder whose residual stream cannot be rotated "
            f"({OBSTACLES[name]}), expected norm, linears and sum in every branch. "
            f"Add --set rotation=none."
        )
        return
    basis = method.basis(checkpoint, settings)
    assert isinstance(basis, Rotation)
    want = logits(checkpoint, Plain())
    torch.testing.assert_close(
        logits(checkpoint, basis), want, atol=1e-4 * want.abs().max(), rtol=0
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_scales_fold_into_what_is_in_front(checkpoint: Checkpoint, name: str) -> None:
    block, rope = checkpoint.decoder.blocks[1], Rope.of(checkpoint, 24)
    sources = [site.source.name if site.source else None for site in block.sites.values()]
    assert sources == SOURCES[name]
    weights, x = load_block(checkpoint, 1), torch.randn(2, 24, 64)
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


def test_sensitivity_is_measured_for_every_node(checkpoint: Checkpoint) -> None:
    schemes = tuple(QuantScheme("ABQGemm", "rtn", bits, 8) for bits in (2, 8))
    job = Measurement(checkpoint, CalibrationSettings(), schemes, IDS.numpy())
    costs = measure(job)
    assert list(costs) == list(checkpoint.decoder.nodes)
    assert all(coarse > fine > 0 for coarse, fine in costs.values())


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
    rotation = () if name in ROTATED else ("--set", "rotation=none")
    out = tmp_path / "out"
    command = [str(checkpoint.source.path), *arguments, *rotation, "--kv-bits", "8"]
    command += ["--nsamples", "3", "--seqlen", "48", "--out", str(out), "--engine", "none"]
    assert main([*command, "--offline", "--progress", "none"]) == 0
    report = json.loads((out / "report" / "report.json").read_text())["validation"]
    assert report["ok"] and not report["first_failure"]
    levels = {row["level"] for row in report["rows"]}
    assert levels == {"weights", "export", "quantisation"}
    worst = {
        row["tensor"]: row["snr_db"]
        for row in report["rows"]
        if row["level"] == "quantisation" and row["phase"] == "prefill"
    }
    assert len(worst) == 3 and (arguments[1] != "4" or min(worst.values()) > 5), worst


def test_a_bad_block_is_named(checkpoint: Checkpoint) -> None:
    block: Any = checkpoint.decoder.blocks[0]
    with pytest.raises(ValueError, match="expected branches of linears that each end in an Add"):
        replace(block, steps=block.steps[:-1])
