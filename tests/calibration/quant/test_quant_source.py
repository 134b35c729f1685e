"""Where the tensors of the quant folder come from: each method's own numbers under the right names,
and why they are what they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.blocks.ranks import Ranks
from calibration.blocks.store import BlockStore
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.data import calibration_windows
from calibration.methods.qqq.settings import QqqSettings
from calibration.methods.rtn import quantize
from calibration.progress import NullProgress
from calibration.quant.bits import Rule, SchemeMap
from calibration.quant.folder import read_quant
from calibration.quant.quantize import QuantizeOptions, quantize_model
from calibration.quant.scheme import QuantScheme
from calibration.quant.source import QuantSource, open_source
from calibration.settings import CalibrationSettings, MethodSettings
from calibration.transforms.rotation import Rotation
from plugins.errors import InputError
from tests.calibration.block_cases import MODELS, QQQ, calibrate_tiny
from tests.calibration.llama import SITES

RTN = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)


class _Told(NullProgress):
    def __init__(self) -> None:
        self.text: list[str] = []

    def message(self, text: str) -> None:
        self.text.append(text)

    warning = message


def _open(
    model: Path,
    work: Path,
    scheme: QuantScheme = QQQ,
    progress: NullProgress | None = None,
    **settings: Any,
) -> QuantSource:
    chosen = {
        "nsamples": 4,
        "seqlen": 32,
        "method": QqqSettings() if scheme.method == "qqq" else MethodSettings(),
        **settings,
    }
    checkpoint = open_checkpoint(str(model), offline=True)
    options = QuantizeOptions(offline=True, settings=CalibrationSettings(**chosen), work=work)
    return open_source(
        checkpoint, SchemeMap(scheme), options, checkpoint.tokenizer(), progress or NullProgress()
    )


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_members_of_a_site_get_their_rows(
    tiny_llama: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tiny_llama(**changes)
    source, store = _open(model, tmp_path / "work"), BlockStore(tmp_path / "work", "", writes=False)
    for index in range(2):
        result = store.load(index)
        for site, members in SITES.items():
            stacked = [source.linear(f"model.layers.{index}.{name}", QQQ) for name in members]
            wanted = result.sites[site]
            np.testing.assert_array_equal(
                np.concatenate([part.codes for part in stacked]), wanted.codes
            )
            np.testing.assert_array_equal(
                np.concatenate([part.scale for part in stacked]), wanted.scale
            )
            has_bias = "mlp_bias" in changes
            assert all(
                (part.bias is not None) is has_bias and part.codes.flags.c_contiguous
                for part in stacked
            )
            if has_bias:
                assert wanted.bias is not None
                np.testing.assert_array_equal(
                    np.concatenate([part.bias for part in stacked if part.bias is not None]),
                    wanted.bias,
                )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            np.testing.assert_array_equal(
                source.rest(f"model.layers.{index}.{norm}.weight"), result.gains[f"{norm}.weight"]
            )
    with pytest.raises(KeyError, match="qkv_proj"):
        source.linear("model.layers.0.self_attn.qkv_proj", QQQ)


def test_what_is_outside_the_blocks_is_in_the_methods_basis(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    rotated = _open(tiny_model_dir, tmp_path / "a", seed=3)
    basis = Rotation.make("hadamard", 64, 16, 3)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(rotated.rest(name), basis.tensor(checkpoint, name).numpy())
    assert checkpoint.decoder.tied and not rotated.decoder.tied
    plain = _open(tiny_model_dir, tmp_path / "b", method=QqqSettings(rotation="none"))
    np.testing.assert_array_equal(
        plain.rest("model.embed_tokens.weight"), checkpoint.array("model.embed_tokens.weight")
    )
    assert plain.decoder == checkpoint.decoder


def test_a_method_without_data_reads_the_model_alone(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_llama(attention_bias=True)
    checkpoint, source = (
        open_checkpoint(str(model), offline=True),
        _open(model, tmp_path / "work", RTN),
    )
    name = "model.layers.1.self_attn.k_proj"
    found, wanted = (
        source.linear(name, RTN),
        quantize(checkpoint.array(f"{name}.weight"), checkpoint.array(f"{name}.bias"), RTN),
    )
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.bias, wanted.bias)
    assert source.linear("model.layers.1.mlp.up_proj", RTN).bias is None
    np.testing.assert_array_equal(
        source.rest("model.norm.weight"), checkpoint.array("model.norm.weight")
    )
    assert (source.facts, source.cost, source.writes, source.decoder) == (
        {},
        {},
        True,
        checkpoint.decoder,
    )


def test_processes_that_do_not_write(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(work=tmp_path / "work", ranks=Ranks(1, 1))
    assert (
        quantize_model(
            open_checkpoint(str(tiny_model_dir), offline=True), RTN, options, tmp_path / "nowhere"
        )
        == {}
    )
    assert list(tmp_path.iterdir()) == []


def test_facts_and_cost(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The folder says what decided the numbers; what it cost goes to whoever asked for it."""
    settings = CalibrationSettings(nsamples=3, seqlen=16, method=QqqSettings(), max_memory=0)
    (tmp_path / "quant").mkdir()
    options = QuantizeOptions(offline=True, settings=settings)
    facts = quantize_model(
        open_checkpoint(str(tiny_model_dir), offline=True), QQQ, options, tmp_path / "quant"
    )
    assert facts["peak_stream_bytes"] == 0 and facts["spilled_bytes"] > 0
    assert facts["seconds"] >= 0  # 0.0 where it took less than 50 ms
    calibration = json.loads((tmp_path / "quant" / "quant.json").read_text())["calibration"]
    assert set(calibration) == {"settings", "windows", "blocks"}
    assert calibration["settings"] == settings.as_dict() and calibration["windows"] == [3, 16]
    assert all(0 < block["loss_after"] < block["loss_before"] for block in calibration["blocks"])


def test_mixed_precision_calibrates_every_node_in_its_own_scheme(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    rules = (
        Rule("down_proj", "w8a8-g32"),
        Rule("layers.0.mlp.gate_up_proj", "w2ba8-g16"),
        Rule("layers.1.self_attn.*", "w4a16"),
    )
    (tmp_path / "bits.txt").write_text("".join(f"{rule.pattern} {rule.bits}\n" for rule in rules))
    assert (
        calibrate_tiny(
            tiny_model_dir,
            tmp_path / "out",
            "--bits-file",
            str(tmp_path / "bits.txt"),
            "--set",
            "rotation=none",
        )
        == 0
    )
    quant = read_quant(tmp_path / "out" / "quant")
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    schemes = SchemeMap(QQQ, rules)
    for index in range(2):
        for linear in checkpoint.decoder.blocks[index].linears:
            name = f"model.layers.{index}.{linear.name}"
            found, wanted = quant.linear(name), schemes.of(name, checkpoint.decoder)
            assert found.scheme == wanted
            weight = checkpoint.array(f"{name}.weight")
            assert np.linalg.norm(found.dequantize() - weight) < (
                0.7 if wanted.levels == 5 else 0.3
            ) * np.linalg.norm(weight)


# ---------------------------------------------------------------- text


def test_windows_are_those_of_the_seed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import calibration.blocks.driver as driver

    given: list[np.ndarray] = []
    real = driver.calibrate
    monkeypatch.setattr(
        driver,
        "calibrate",
        lambda job, progress: (given.append(job.windows), real(job, progress))[1],
    )
    tokenizer = open_checkpoint(str(tiny_model_dir), offline=True).tokenizer()
    for seed in (0, 0, 5):
        _open(tiny_model_dir, tmp_path / "work", seed=seed)
        wanted, _ = calibration_windows(
            tokenizer, CalibrationSettings(nsamples=4, seqlen=32, seed=seed), 256, 512
        )
        np.testing.assert_array_equal(given[-1], wanted)
    assert np.array_equal(given[0], given[1]) and not np.array_equal(given[0], given[2])


def test_fewer_windows_than_asked_for_are_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The river runs to the sea. " * 30)
    told = _Told()
    source = _open(
        tiny_model_dir,
        tmp_path / "work",
        progress=told,
        calib=str(tmp_path / "text.txt"),
        nsamples=500,
    )
    count = source.facts["windows"][0]
    assert 1 < count < 500
    assert told.text[0] == f"Calibrating on {count} windows of 32 tokens; 500 of 32 were asked for."
    assert [text.split(":")[0] for text in told.text[1:]] == ["block 1 of 2", "block 2 of 2"]
    told = _Told()
    _open(
        tiny_model_dir, tmp_path / "work", progress=told, seqlen=9999, nsamples=1
    )  # more than the model takes
    assert told.text[0] == "Calibrating on 1 windows of 256 tokens; 1 of 9999 were asked for."


@pytest.mark.parametrize("scheme", [QQQ, RTN], ids=["qqq", "rtn"])
def test_a_text_without_text(tiny_model_dir: Path, tmp_path: Path, scheme: QuantScheme) -> None:
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(InputError) as caught:
        _open(tiny_model_dir, tmp_path / "work", scheme, calib=str(tmp_path / "text.txt"))
    assert (
        str(caught.value)
        == f"--calib: got {tmp_path / 'text.txt'} with no text in it. Give a file with at least "
        f"a few thousand words."
    )
    assert not (tmp_path / "work").exists()


def test_a_text_of_one_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(InputError) as caught:
        _open(tiny_model_dir, tmp_path / "work", calib=str(tmp_path / "text.txt"))
    assert (
        str(caught.value)
        == "--calib: got a text of 1 tokens, expected at least 2. Give a longer text."
    )


def test_tensors_are_finite_and_of_the_seed(tiny_model_dir: Path, tmp_path: Path) -> None:
    a, b = _open(tiny_model_dir, tmp_path / "a"), _open(tiny_model_dir, tmp_path / "b", seed=1)
    name = "model.layers.0.mlp.down_proj"
    assert torch.isfinite(torch.from_numpy(a.linear(name, QQQ).scale)).all()
    assert not np.array_equal(a.linear(name, QQQ).codes, b.linear(name, QQQ).codes)
