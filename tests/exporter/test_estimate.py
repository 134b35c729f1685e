"""What an export takes: the estimate against what is there, and against what a run took."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

import exporter.estimate
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods import find_method
from calibration.out.layout import ENGINE, ONNX, QUANT, WORK
from calibration.quant.bits import as_map
from calibration.quant.scheme import QuantScheme
from calibration.settings import CalibrationSettings
from exporter.estimate import Estimate, check_room, estimate
from plugins.errors import InputError
from tests.conftest import FAMILIES

SETTINGS = CalibrationSettings(nsamples=100, seqlen=1000)


def asked(
    folder: Path, *stages: str, method: str = "qqq", settings: CalibrationSettings = SETTINGS
) -> Estimate:
    """Of a W4A8 model."""
    schemes = as_map(QuantScheme("QQQGemm", method, 4, 8, act_symmetric=True))
    calibrates = find_method(method).looks_at_data
    return estimate(open_checkpoint(str(folder)), schemes, settings, stages, calibrates)


def test_the_way_to_an_engine_needs_each_copy(tiny_llama: Callable[..., Path]) -> None:
    quant, onnx, engine = (
        asked(tiny_llama(), *stages) for stages in ((QUANT,), (QUANT, ONNX), (QUANT, ONNX, ENGINE))
    )
    assert (onnx.kept, engine.kept) == (2 * quant.kept, 3 * quant.kept)
    hidden = open_checkpoint(str(tiny_llama())).decoder.hidden
    saved = 2 * 8 * 100 * 1000 * hidden  # streams behind a block, and those before it
    assert (quant.disk, engine.disk) == (2 * quant.kept + saved, 4 * quant.kept + saved)
    assert asked(tiny_llama(), QUANT, method="rtn").disk == 2 * quant.kept
    assert list(quant.memory) == list(onnx.memory) == [QUANT]
    assert engine.memory[ENGINE] == int(0.4e9 + 2.05 * quant.kept)
    assert str(engine).startswith("estimate: ") and str(engine).endswith(" for engine")


def test_streams_count_in_memory_or_on_the_disk(tiny_llama: Callable[..., Path]) -> None:
    hidden = open_checkpoint(str(tiny_llama())).decoder.hidden
    streams = 8 * 100 * 1000 * hidden
    free = asked(tiny_llama(), QUANT)
    bound = CalibrationSettings(nsamples=100, seqlen=1000, max_memory=1000)
    spilled = asked(tiny_llama(), QUANT, settings=bound)
    assert free.memory[QUANT] - spilled.memory[QUANT] == streams - 1000
    assert spilled.disk == free.disk + max(0, streams - 1000 - free.kept)
    plain = asked(tiny_llama(), QUANT, method="rtn")
    assert plain.memory[QUANT] < free.memory[QUANT] - streams


def test_the_largest_block_counts_with_all_its_experts(tiny_llama: Callable[..., Path]) -> None:
    """The first one may be dense; and what experts make is summed up in a stream of its own."""
    sizes = {**FAMILIES["Qwen3Moe"], "moe_intermediate_size": 4096, "num_experts": 6}
    folder = tiny_llama(architecture="Qwen3Moe", **sizes | {"mlp_only_layers": [0]})
    found = open_checkpoint(str(folder)).decoder
    first, second, *_ = (
        sum(prod(linear.shape) for linear in block.linears) for block in found.blocks
    )
    assert second > 6 * 3 * 64 * 4096 > 10 * first
    got = asked(folder, QUANT).memory[QUANT]
    assert got == int(0.4e9 + 10 * second + 5.4 * 8 * 4096**2 + 12 * 100 * 1000 * found.hidden)


@pytest.mark.parametrize(
    ("stage", "fix"),
    [
        (QUANT, "Give --max-memory, fewer --nsamples, or --effort fast"),
        (ENGINE, "Give --until onnx, and build the engine on a machine with more memory"),
    ],
)
def test_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, fix: str
) -> None:
    monkeypatch.setattr(exporter.estimate, "usable_memory", lambda: 10**12)
    check_room(tmp_path, Estimate(0, 0, {stage: 7_800_000_000}))
    monkeypatch.setattr(exporter.estimate, "usable_memory", lambda: 5_000_000_000)
    with pytest.raises(InputError) as caught:
        check_room(tmp_path, Estimate(0, 0, {stage: 7_800_000_000}))
    assert str(caught.value) == (f"{stage}: got 5.0 GB of free memory, expected 7.8 GB. {fix}.")


def test_what_an_interrupted_run_left_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.estimate, "free_bytes", lambda _: 2_000_000)
    asked_for = Estimate(5_000_000, 0, {})
    problem = "got 2 MB of free space, expected at least 5 MB"
    with pytest.raises(InputError, match=problem):
        check_room(tmp_path, asked_for)
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "streams-00001-0-of-1.bin").write_bytes(bytes(3_000_000))
    check_room(tmp_path, asked_for)
