"""QQQ end to end on tiny models: codes that arrive untouched, errors that shrink, and models and
texts that are not nice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.blocks.driver import BlockTask
from calibration.blocks.forward import block_output, float_linear
from calibration.blocks.rounding import Plain, SiteSolver
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods import find_method
from calibration.methods.qqq.method import round as gptq_rule
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.folder import read_quant
from calibration.solvers.hessian import Moments
from calibration.transforms.rotation import Rotation
from plugins import op_spec
from plugins.core.op_spec import QuantArrays
from tests.calibration.block_cases import (
    MODELS,
    QQQ,
    QQQ_GROUPS,
    W3A6,
    block_task,
    calibrate_tiny,
    files,
    streams,
)
from tests.calibration.llama import OUT, QKV, SITES

Make = Callable[..., Path]
METHOD = find_method("qqq").block_method
PLAIN = QqqSettings(rotation="none", smooth="none", gptq=False, correct=0.0)


def _relative_error(task: BlockTask) -> float:
    """Of the quantised stream behind a block against the float one; calibrates it."""
    inputs = torch.stack(list(task.streams.quant))
    wanted = block_output(
        inputs, task.weights, float_linear(task.weights, task.block), task.block, task.rope
    )
    METHOD.calibrate(task)
    return float((torch.stack(list(task.streams.quant)) - wanted).norm() / (wanted - inputs).norm())


# ---------------------------------------------------------------- how good


@pytest.mark.parametrize(
    "scheme", [QQQ, QQQ_GROUPS, W3A6], ids=lambda scheme: f"{scheme.op}-{scheme.label}"
)
@pytest.mark.parametrize(
    "changes", [MODELS["tied, grouped queries"], MODELS["biases"]], ids=["plain", "biases"]
)
def test_gptq_and_correction_shrink_the_error(
    tiny_llama: Make, changes: dict[str, Any], scheme: Any
) -> None:
    model = tiny_llama(**changes)
    nearest = _relative_error(block_task(model, PLAIN, scheme))
    solved = _relative_error(block_task(model, replace(PLAIN, gptq=True), scheme))
    corrected = _relative_error(block_task(model, replace(PLAIN, gptq=True, correct=1.0), scheme))
    assert solved < 0.9 * nearest and corrected < 1.02 * solved


def test_report_counts_the_error_before_and_after(tiny_model_dir: Path) -> None:
    report = METHOD.calibrate(block_task(tiny_model_dir, replace(PLAIN, gptq=True))).report
    assert 0 < report["loss_after"] < report["loss_before"] < 0.1 and report["notes"] == []
    report = METHOD.calibrate(block_task(tiny_model_dir, PLAIN)).report
    assert report["loss_after"] == report["loss_before"]


def test_a_smoothed_output_projection_is_exported_smoothed(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known scales at o_proj, with grouped queries: values carry 1 / s and columns s, also behind
    the quantisation.
    """
    for changes in (MODELS["tied, grouped queries"], MODELS["biases, untied, one key for all"]):
        model = tiny_llama(**changes)
        task = block_task(model, replace(PLAIN, smooth="all", gptq=True))
        one = 8 ** torch.rand(
            task.block.heads.kv_heads,
            1,
            task.block.heads.head_dim,
            generator=torch.Generator().manual_seed(0),
        )
        scale = one.expand(-1, task.block.heads.groups, -1).flatten()
        monkeypatch.setattr(
            "calibration.blocks.rounding.adaptive_scales",
            lambda task, sites, scale=scale: {OUT: scale},
        )
        assert _relative_error(task) < 1.5 * _relative_error(
            block_task(model, replace(PLAIN, gptq=True))
        )


def test_basis(tiny_model_dir: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    for rotation, kind in (("none", Plain), ("hadamard", Rotation), ("orthogonal", Rotation)):
        task = block_task(tiny_model_dir, QqqSettings(rotation=rotation))
        assert type(METHOD.basis(checkpoint, task.settings)) is kind
    assert METHOD.wants_real(block_task(tiny_model_dir, QqqSettings(correct=0.5)).settings)
    assert not METHOD.wants_real(block_task(tiny_model_dir, QqqSettings(correct=0.0)).settings)


# ---------------------------------------------------------------- inputs that say nothing


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "scheme", [QQQ, QQQ_GROUPS, W3A6], ids=lambda scheme: f"{scheme.op}-{scheme.label}"
)
def test_moments_that_say_nothing_round_to_nearest_with_a_note(
    tiny_model_dir: Path, scheme: Any, value: float
) -> None:
    task = block_task(tiny_model_dir, scheme=scheme)
    solver, moments = SiteSolver(task, task.weights, gptq_rule), Moments(64, cross=True)
    moments.hessian += value
    arrays = solver(QKV, moments)
    spec, attrs = op_spec(scheme.op), scheme.attributes(*arrays.codes.shape, False)
    assert np.isfinite(spec.dequantize(arrays, attrs)).all()
    assert solver.notes == [f"{QKV}: no usable calibration inputs, rounded to nearest"]
    json.dumps(solver.report(), allow_nan=False)


def test_dead_channels_and_rows_of_zeros(tiny_model_dir: Path) -> None:
    weights = dict(block_task(tiny_model_dir).weights)
    weights["self_attn.q_proj.weight"] = weights["self_attn.q_proj.weight"].clone()
    weights["self_attn.q_proj.weight"][7] = 0
    task = block_task(tiny_model_dir, QqqSettings(rotation="none"), weights=weights)
    x = torch.stack(list(task.streams.quant))
    x[..., 11] = 0  # a channel that no token of the text uses
    task = replace(task, streams=streams(list(x)))
    result = METHOD.calibrate(task)
    values = op_spec("QQQGemm").dequantize(result.sites[QKV], QQQ.attributes(128, 64, False))
    assert (values[7] == 0).all() and np.isfinite(values).all()
    assert result.report["notes"] == []
    assert all(torch.isfinite(window).all() for window in task.streams.quant)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "more",
    [(), ("--group-size", "64"), ("--set", "smooth=all", "--set", "rotation=none")],
    ids=["channel", "groups", "smooth"],
)
def test_codes_reach_the_folder_and_the_packed_words_untouched(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """The published code derives the codes again from rounded weights when it packs."""
    import onnx

    from exporter.graph.decoder import export_onnx

    solved: list[tuple[str, QuantArrays]] = []
    real = SiteSolver.__call__

    def spy(self: SiteSolver, site: str, moments: Moments | None) -> QuantArrays:
        solved.append((site, real(self, site, moments)))
        return solved[-1][1]

    monkeypatch.setattr(SiteSolver, "__call__", spy)
    assert calibrate_tiny(tiny_model_dir, tmp_path, *more) == 0
    quant = read_quant(tmp_path / "quant")
    (tmp_path / "onnx").mkdir()
    export_onnx(quant, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == "QQQGemm"}
    assert len(solved) == len(nodes) == 8
    for place, (site, arrays) in enumerate(solved):
        node, parts = f"model.layers.{place // 4}.{site}", []
        for member in SITES[site]:
            parts.append(quant.linear(f"model.layers.{place // 4}.{member}").arrays)
        for name in ("codes", "scale", "scale_group"):
            stored = [getattr(part, name) for part in parts]
            assert (stored[0] is None) == (getattr(arrays, name) is None)
            if stored[0] is not None:
                np.testing.assert_array_equal(np.concatenate(stored), getattr(arrays, name))
        epsilon = next(item.f for item in nodes[node].attribute if item.name == "norm_epsilon")
        attrs = replace(quant.scheme.attributes(*arrays.codes.shape, False), norm_epsilon=epsilon)
        spec = op_spec("QQQGemm")
        names = dict(zip(spec.input_names(attrs)[1:], nodes[node].input[1:], strict=True))
        back = spec.unpack({name: tensors[value] for name, value in names.items()}, attrs)
        np.testing.assert_array_equal(back.codes, arrays.codes)
        np.testing.assert_array_equal(back.scale, arrays.scale)


def _logits(out: Path) -> Tensor:
    from calibration.reference.model import quantised_model

    with torch.no_grad():
        logits: Tensor = quantised_model(read_quant(out / "quant"))(
            torch.arange(40)[None] % 512
        ).logits
    return logits


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_build_of_a_model(tiny_llama: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Rotated and not, the quantised model stays near the float one; a rotated one has a head of
    its own.
    """
    from transformers import AutoModelForCausalLM

    model = tiny_llama(**changes)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(
            torch.arange(40)[None] % 512
        ).logits
    for rotation in ("hadamard", "none"):
        out = tmp_path / rotation
        assert (
            calibrate_tiny(
                model,
                out,
                "--set",
                f"rotation={rotation}",
                "--dtype",
                "float32",
                "--nsamples",
                "16",
                "--head-bits",
                "16",
            )
            == 0
        )
        quant = read_quant(out / "quant")
        tied = changes.get("tie_word_embeddings", True) and rotation == "none"
        assert (
            quant.config["tie_word_embeddings"] is tied and quant.has("lm_head.weight") is not tied
        )
        assert (
            _logits(out) - wanted
        ).norm() < 0.5 * wanted.norm()  # of another function it is more than all of it


def _altered(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_in_the_weights_is_named(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = _altered(
        tiny_model_dir, tmp_path / "model", lambda tensors: tensors[name][3].fill_(float("nan"))
    )
    assert calibrate_tiny(model, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"{model}, tensor {name}: got nan at [3, 0], expected finite numbers. "
        "The weights are damaged: download or train them again.\n"
    )
    assert not (tmp_path / "out" / "quant").exists()


def test_weights_with_dead_channels_and_rows_of_zeros(tiny_llama: Make, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"][4:9] = 0
        tensors[
            "model.layers.0.mlp.up_proj.weight"
        ].zero_()  # down_proj of this block sees zeros alone
        tensors["model.layers.1.input_layernorm.weight"][:10] = 0
        tensors["model.layers.1.self_attn.o_proj.weight"][:, 7] = 0

    for more in ((), ("--set", "rotation=none", "--set", "smooth=all", "--group-size", "64")):
        out = tmp_path / str(len(more))
        assert (
            calibrate_tiny(_altered(tiny_llama(), out.with_suffix(".model"), change), out, *more)
            == 0
        )
        blocks = json.loads((out / "quant" / "quant.json").read_text())["calibration"]["blocks"]
        assert [block["notes"] for block in blocks] == [
            ["mlp.down_proj: no usable calibration inputs, rounded to nearest"],
            [],
        ]
        assert torch.isfinite(_logits(out)).all()


TEXTS = {
    "another language": "Der Fluß fließt ruhig durch die weite Ebene, und überall blühen die Wiesen. ".encode()
    * 60,
    "random characters": "".join(
        map(chr, np.random.default_rng(0).integers(1, 0xD800, 3000))
    ).encode(),
    "one word": b"word",
    "the same word": b"word " * 2000,
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_any_text_ends_in_a_model_without_nan(
    tiny_model_dir: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert (
        calibrate_tiny(tiny_model_dir, tmp_path / "out", "--calib", str(tmp_path / "text.txt")) == 0
    )
    assert torch.isfinite(_logits(tmp_path / "out")).all()
    json.loads(
        (tmp_path / "out" / "quant" / "quant.json").read_text(),
        parse_constant=lambda name: pytest.fail(name),
    )


def test_a_text_far_from_the_use_costs_accuracy(tiny_llama: Make, tmp_path: Path) -> None:
    """So the calibration does look at the text."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(
            torch.arange(40)[None] % 512
        ).logits
    errors = []
    for name in ("default", "same word"):
        more = () if name == "default" else ("--calib", str(tmp_path / "text.txt"))
        (tmp_path / "text.txt").write_text("word " * 2000)
        assert calibrate_tiny(model, tmp_path / name, *more, "--nsamples", "16") == 0
        errors.append(float((_logits(tmp_path / name) - wanted).norm()))
    assert errors[0] < errors[1]


def test_the_seed_decides_the_rotation_and_the_windows(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "1"))):
        assert calibrate_tiny(tiny_model_dir, tmp_path / name, *more) == 0
    a, b, c = (files(tmp_path / name / "quant") for name in "abc")
    assert a == b and a["model-00001-of-00001.safetensors"] != c["model-00001-of-00001.safetensors"]
