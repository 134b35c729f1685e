"""The driver over whole tiny models: interrupted anywhere and gone on with, the bytes are those of
a run that never stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration.blocks import driver
from calibration.blocks.driver import BlockTask, Calibration, calibrate
from calibration.blocks.rounding import RoundingMethod
from calibration.blocks.saved_streams import SavedStreams
from calibration.blocks.store import BlockResult, BlockStore
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods import find_method
from calibration.methods.qqq.settings import QqqSettings
from calibration.settings import CalibrationSettings
from tests.calibration.block_cases import MODELS, QQQ, calibrate_tiny, files, tokens
from tests.calibration.llama import SITES
from tests.conftest import FAMILIES, FOUR_WINDOWS, W4A8

REPOSITORY = Path(__file__).resolve().parents[3]
LAYERS = 3


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    """Of three blocks."""
    return tiny_llama(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The quant folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert calibrate_tiny(model, out) == 0
    return files(out / "quant")


def _kept(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *more: str) -> list[str]:
    """Go on with --resume; which blocks were kept."""
    capsys.readouterr()
    assert calibrate_tiny(model, out, "--progress", "plain", *more) == 0
    return [
        line.split(":")[0]
        for line in capsys.readouterr().err.splitlines()
        if line.endswith(": kept")
    ]


def _names(count: int) -> list[str]:
    return [f"block {index + 1} of {LAYERS}" for index in range(count)]


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(28, "No space left on device")],
    ids=["ctrl-c", "full disk"],
)
@pytest.mark.parametrize("block", range(LAYERS))
def test_stopped_at_a_block(
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    block: int,
    error: BaseException,
) -> None:
    real = RoundingMethod.calibrate

    def die(self: RoundingMethod, task: BlockTask) -> BlockResult:
        if task.block.index == block:
            real(self, task)  # the streams have moved on when it dies
            raise error
        return real(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(RoundingMethod, "calibrate", die)
        code = calibrate_tiny(model, tmp_path)
    said = capsys.readouterr().err
    if isinstance(error, KeyboardInterrupt):
        assert (
            code == 130
            and said
            == "Interrupted; what is finished is kept. Run the same command with --resume to go on.\n"
        )
    else:
        assert code == 2 and said == (
            f"{tmp_path / 'quant'}: got No space left on device while writing, expected a "
            f"writable folder with "
            "enough space. Check the disk and the permissions; earlier results are whole.\n"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".calibration", ".lock"]
    assert _kept(capsys, model, tmp_path, "--resume") == _names(block)
    assert files(tmp_path / "quant") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "quant"]


def test_stopped_while_the_folder_is_written(
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("calibration.quant.quantize.SafetensorsWriter.write", die)
        assert calibrate_tiny(model, tmp_path) == 130
    for path in (tmp_path / ".calibration").glob("streams-*"):
        path.unlink()  # as on a disk that was full: nobody needs them any more
    with monkeypatch.context() as patch:
        patch.setattr("calibration.blocks.driver.walk", pytest.fail)
        assert _kept(capsys, model, tmp_path, "--resume") == _names(LAYERS)
    assert files(tmp_path / "quant") == whole


def test_model_and_text_may_be_named_otherwise(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The river runs to the sea, and the sea to the sky. " * 40)
    with monkeypatch.context() as patch:
        patch.setattr("calibration.quant.quantize.SafetensorsWriter.write", die)
        assert calibrate_tiny(model, out, "--calib", str(text)) == 130
    monkeypatch.chdir(tmp_path)
    link = Path("link")
    link.symlink_to(model)
    assert _kept(capsys, link, out, "--resume", "--calib", "./text.txt") == _names(LAYERS)


@pytest.mark.slow
def test_killed(
    model: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of a real process, behind its first block."""
    command = [
        sys.executable,
        "-m",
        "calibration",
        str(model),
        *W4A8,
        *FOUR_WINDOWS,
        "--out",
        str(tmp_path),
        "--offline",
        "--progress",
        "json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "progress":
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "quant").exists()
    kept = _kept(capsys, model, tmp_path, "--resume")
    assert (
        kept == _names(len(kept)) and kept
    )  # another block may have been finished before the signal came
    assert files(tmp_path / "quant") == whole


def _stopped(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """A run that ends behind its second block."""
    real = RoundingMethod.calibrate

    def die(self: RoundingMethod, task: BlockTask) -> BlockResult:
        if task.block.index == 2:
            raise KeyboardInterrupt
        return real(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(RoundingMethod, "calibrate", die)
        assert calibrate_tiny(model, out, *more) == 130


def test_a_damaged_block_is_made_again(
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _stopped(model, tmp_path, monkeypatch)
    path = tmp_path / ".calibration" / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert _kept(capsys, model, tmp_path, "--resume") == _names(1)
    assert files(tmp_path / "quant") == whole


def test_only_with_resume(
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _stopped(model, tmp_path, monkeypatch)
    assert _kept(capsys, model, tmp_path) == []
    assert files(tmp_path / "quant") == whole


def test_memory_may_change_in_between(
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _stopped(model, tmp_path, monkeypatch, "--max-memory", "0.000001")
    assert _kept(capsys, model, tmp_path, "--resume", "--max-memory", "1") == _names(2)
    assert files(tmp_path / "quant") == whole


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", "1"),
        ("--nsamples", "5"),
        ("--set", "damp=0.02"),
        ("--group-size", "64"),
        ("--calib", "TEXT"),
        ("--dtype", "bfloat16"),
    ],
    ids=lambda more: more[0],
)
def test_other_settings_start_over(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: Sequence[str],
) -> None:
    (tmp_path / "text.txt").write_text("The river runs to the sea. " * 60)
    more = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in more]
    _stopped(model, tmp_path / "out", monkeypatch)
    assert _kept(capsys, model, tmp_path / "out", "--resume", *more) == []
    assert calibrate_tiny(model, tmp_path / "fresh", *more) == 0
    assert files(tmp_path / "out" / "quant") == files(tmp_path / "fresh" / "quant")


def test_another_model_or_other_code_starts_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    _stopped(copy, tmp_path / "out", monkeypatch)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-4] ^= 1  # the last bit of a weight
    (copy / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as patch:
        _stopped(copy, tmp_path / "out", patch, "--resume")
        assert capsys.readouterr().err.count("Interrupted") == 2
        patch.setattr("calibration.quant.source.code_digest", lambda *patterns: "other code")
        assert _kept(capsys, copy, tmp_path / "out", "--resume") == []


@pytest.mark.parametrize(
    "more", [(), ("--set", "smooth=all", "--group-size", "64")], ids=["default", "smoothed groups"]
)
def test_without_any_memory_the_bytes_are_the_same(
    tiny_llama: Callable[..., Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    model = tiny_llama(**MODELS["biases"])
    for name, memory in (("memory", ()), ("disk", ("--max-memory", "0.000001"))):
        assert calibrate_tiny(model, tmp_path / name, *more, *memory) == 0
    assert files(tmp_path / "memory" / "quant") == files(tmp_path / "disk" / "quant")


# ---------------------------------------------------------------- what it tells


class _Notes:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, stage: str, total: int) -> None:
        self.calls.append((stage, total))

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.calls.append((steps, note))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def warning(self, text: str) -> None:
        raise AssertionError(text)

    def message(self, text: str) -> None:
        self.calls.append((text,))

    def close(self) -> None:
        pass


def _job(model: Path, folder: Path, **settings: Any) -> Calibration:
    return Calibration(
        open_checkpoint(str(model), offline=True),
        find_method("qqq").block_method,
        lambda name: QQQ,
        CalibrationSettings(method=QqqSettings(), **settings),
        np.asarray(tokens().numpy()),
        BlockStore(folder, "print"),
    )


def test_reports_costs_and_a_note_per_block(model: Path, tmp_path: Path) -> None:
    notes = _Notes()
    done = calibrate(_job(model, tmp_path / "a", max_memory=10_000), notes)
    assert [set(report) for report in done.reports] == [
        {"loss_before", "loss_after", "notes"}
    ] * LAYERS
    assert set(done.cost) == {"seconds", "peak_stream_bytes", "spilled_bytes"}
    assert (
        done.cost["seconds"] >= 0
        and done.cost["peak_stream_bytes"] <= 10_000 < done.cost["spilled_bytes"]
    )
    assert notes.calls[0] == ("calibrate", LAYERS) and notes.calls[-1] == ("finish",)
    told = [call[0] for call in notes.calls if len(call) == 1 and call != ("finish",)]
    estimate = told.pop(2)  # behind two blocks of three
    assert re.fullmatch(
        r"estimate: about [\d.]+ s for 1 more block, after [\d.]+ s and [\d.]+ s for these; [\d.]+ GB of "
        "memory until now. If that is too long, stop it: --resume goes on from here",
        estimate,
    )
    assert told == [call[1] for call in notes.calls if call[0] == 1] and len(told) == LAYERS
    first, last = done.reports[0], done.reports[-1]
    assert told[0].startswith(
        f"block 1 of {LAYERS}: loss {first['loss_before']:.3g} -> {first['loss_after']:.3g}, about "
    )
    assert (
        told[-1]
        == f"block {LAYERS} of {LAYERS}: loss {last['loss_before']:.3g} -> {last['loss_after']:.3g}"
    )
    notes = _Notes()
    again = calibrate(_job(model, tmp_path / "a"), notes)
    assert again.reports == done.reports and again.cost["spilled_bytes"] == 0
    assert notes.calls[0] == ("calibrate", 0)  # nothing of this run that would tell a time


def test_the_time_that_is_left_counts_the_disk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, notes = [0.0], _Notes()

    def slow(self: SavedStreams, *rest: Any) -> None:
        clock[0] += 7.0

    monkeypatch.setattr(SavedStreams, "save", slow)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    calibrate(_job(model, tmp_path / "a"), notes)
    told = [call[1] for call in notes.calls if call[0] == 1]
    assert "about 14 s left" in told[0] and "about 7.0 s left" in told[1]


def test_blocks_arrive_in_order_with_their_schemes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    seen: list[tuple[int, int]] = []
    real = RoundingMethod.calibrate

    def spy(self: RoundingMethod, task: BlockTask) -> BlockResult:
        seen.append((task.block.index, task.count))
        assert task.device == "cpu" and tuple(task.schemes) == tuple(SITES)
        return real(self, task)

    monkeypatch.setattr(RoundingMethod, "calibrate", spy)
    job = _job(model, tmp_path / "a")
    calibrate(
        Calibration(
            job.checkpoint,
            find_method("qqq").block_method,
            lambda name: (asked.append(name), QQQ)[1],
            job.settings,
            job.windows,
            job.store,
        )
    )
    assert seen == [(index, LAYERS) for index in range(LAYERS)]
    assert asked == [f"model.layers.{index}.{site}" for index in range(LAYERS) for site in SITES]
    assert len(BlockStore(tmp_path / "a", "print").digests()) == LAYERS


LONG_ROPE = {**FAMILIES["Phi3"], "sliding_window": None, "original_max_position_embeddings": 24}


@pytest.mark.parametrize(("most", "factors"), [(24, "short"), (64, "long"), (None, "long")])
def test_windows_turn_as_the_export_does(
    tiny_llama: Callable[..., Path], tmp_path: Path, most: int | None, factors: str
) -> None:
    """Whatever the windows' own length, here 32 tokens: as of a model that has no others."""
    rope = LONG_ROPE["rope_parameters"]
    same = dict.fromkeys(("short_factor", "long_factor"), rope[f"{factors}_factor"])
    found = []
    for number, parameters in enumerate((rope, rope | same)):
        model = tiny_llama(architecture="Phi3", **{**LONG_ROPE, "rope_parameters": parameters})
        settings = CalibrationSettings(
            method=QqqSettings(rotation="none", smooth="none"), max_context=most
        )
        store = BlockStore(tmp_path / str(number), "")
        job = Calibration(
            open_checkpoint(str(model), offline=True),
            find_method("qqq").block_method,
            lambda name: QQQ,
            settings,
            tokens(2).numpy(),
            store,
        )
        calibrate(job)
        found.append(store.load(1).sites["mlp.down_proj"].codes)
    np.testing.assert_array_equal(*found)


def test_a_context_counts_by_its_frequencies(
    tiny_llama: Callable[..., Path], tiny_model_dir: Path
) -> None:
    def stamps(folder: Path) -> list[bool]:
        checkpoint = open_checkpoint(str(folder), offline=True)
        first, *others = (
            CalibrationSettings(max_context=most).stamp(checkpoint) for most in (24, 12, 25, None)
        )
        return [first == other for other in others]

    assert stamps(tiny_llama(architecture="Phi3", **LONG_ROPE)) == [True, False, False]
    assert stamps(tiny_model_dir) == [True] * 3
