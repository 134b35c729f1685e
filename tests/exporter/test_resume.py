"""Resume: what changed is redone with all that follows from it, and no moment of interruption
leaves a folder that cannot go on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import exporter.graph.decoder
from calibration.checkpoints.safetensors import SafetensorsWriter
from calibration.out.files import write_json
from calibration.out.layout import DATA_FILE, PROOF_WORK, STAGES, WORK
from calibration.progress import NullProgress
from calibration.quant.bits import as_map
from calibration.quant.scheme import QuantScheme
from exporter.engine.edition import Edition
from exporter.proof.result import ValidationResult
from exporter.proof.validate import NO_FLOATS
from exporter.stages import ExportRequest, ReportStage
from plugins.errors import EXIT_INPUT, EXIT_INTERRUPT, InputError
from tests.conftest import W4A8
from tests.exporter.engine_cases import ENGINE

Run = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[2]
WHOLE = ("--until", "report", "--engine", "auto", "--resume")


def test_resume_redoes_only_what_changed(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out)[0] == 0
    _, _, err = run(out, "--resume")
    assert "quant: kept, nothing changed\nonnx: kept, nothing changed\n" in err
    data = out / "onnx" / DATA_FILE
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + b"\xff")
    _, _, err = run(out, "--resume")
    assert f"onnx: made again, {data}: got SHA-256" in err and "quant: kept" in err
    assert data.read_bytes() == whole


@pytest.mark.parametrize("name", ["helper.py", "tokenizer.model"])
def test_a_stage_with_a_file_that_is_not_its_own_is_not_kept(
    run: Run, tmp_path: Path, name: str
) -> None:
    """Commands refuse it, and say that --resume helps."""
    out = tmp_path / "out"
    run(out)
    for stage in ("onnx", "quant"):
        stranger = out / stage / name
        stranger.write_text("")
        (out / stage / "notes").write_text("my own")
        _, _, err = run(out, "--resume")
        assert (
            f"{stage}: made again, {stranger}: got a file without a record, expected one of this "
            "stage's\n"
        ) in err
        assert ("quant: kept, nothing changed" in err) == (stage == "onnx")
        assert not stranger.exists()
    _, _, err = run(out, "--resume")
    assert "quant: kept" in err and "onnx: kept" in err


def test_the_same_model_and_text_by_any_name_is_kept(
    run: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (tmp_path / "text.txt").write_text("The river runs to the sea. " * 20)
    (tmp_path / "below").mkdir()
    kept = "quant: kept, nothing changed\nonnx: kept, nothing changed\n"

    def export(name: str, calib: str, *more: str) -> str:
        code, _, err = run(out, "--calib", calib, *more, model=name)
        assert code == 0, err
        return err

    monkeypatch.chdir(tmp_path)
    export("model", "text.txt")
    for name, calib in (
        ("model/", "./text.txt"),
        ("./model", "below/../text.txt"),
        (str(model), str(tmp_path / "text.txt")),
    ):
        assert kept in export(name, calib, "--resume")
    monkeypatch.chdir("below")
    assert kept in export("../model", "../text.txt", "--resume")
    (tmp_path / "model").rename(tmp_path / "below" / "moved")
    assert kept in export("moved", "../text.txt", "--resume")


def test_an_alias_and_what_it_stands_for_are_one_model(
    run: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, commit = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-360M-Instruct", "0" * 40
    snapshot = hub / "snapshots" / commit
    (hub / "refs").mkdir(parents=True)
    (hub / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    for number, path in enumerate(tiny_model_dir.iterdir()):
        shutil.copy(path, hub / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for number, name in enumerate(
        ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", str(snapshot))
    ):
        code, _, err = run(tmp_path / "out", "--resume", model=name)
        assert code == 0, err
        assert ("quant: kept, nothing changed" in err) == (number > 0)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_stage_that_dies_can_be_resumed(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    refused: Callable[[tuple[int, str, str], str], None],
) -> None:
    out = tmp_path / "out"

    def die(quant: Any, folder: Path, *arguments: Any, **options: Any) -> None:
        (folder / "half").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(exporter.graph.decoder, "export_onnx", die)
        result = run(out)
    if isinstance(failure, KeyboardInterrupt):
        assert result[0] == EXIT_INTERRUPT
        assert (
            result[2].splitlines()[-1]
            == "Interrupted; finished stages are kept. Run the same command with --resume to go on."
        )
    else:
        refused(
            result,
            f"{out / 'onnx'}: got No space left on device while writing, expected a writable "
            f"folder with enough space. "
            "Check the disk and the permissions; earlier results are whole.",
        )
    assert sorted(path.name for path in out.iterdir()) == [".lock", "manifest.json", "quant"]
    code, _, err = run(out, "--resume")
    assert (
        code == 0
        and "quant: kept, nothing changed" in err
        and (out / "onnx" / "model.onnx").exists()
    )


@pytest.mark.parametrize("moment", range(1, 6))
def test_ctrl_c_at_any_write_of_the_manifest_can_be_resumed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    out, calls = tmp_path / "out", iter(range(1, 100))

    def write(path: Path, value: Any) -> None:
        if next(calls) == moment:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("exporter.pipeline.write_json", write)
        assert run(out)[0] == EXIT_INTERRUPT
    assert (out / WORK).exists() == (moment in (2, 3))  # weight files that are whole
    with monkeypatch.context() as patch:
        if moment > 1:
            patch.setattr(SafetensorsWriter, "write", pytest.fail)
        code, _, err = run(out, "--resume")
    assert code == 0 and ("quant: kept" in err) == (moment > 3)
    assert not (out / WORK).exists()
    assert list(json.loads((out / "manifest.json").read_text())["stages"]) == ["onnx", "quant"]


@pytest.mark.slow
def test_a_real_ctrl_c(
    tiny_model_dir: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "exporter",
        str(tiny_model_dir),
        *W4A8,
        "--method",
        "rtn",
        "--out",
        str(out),
        "--engine",
        "none",
        "--offline",
        "--progress",
        "json",
    ]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if (event["event"], event["stage"]) == ("progress", "report"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPT and "Traceback" not in err
    assert (
        err.splitlines()[-1]
        == "Interrupted; finished stages are kept. Run the same command with --resume to go on."
    )
    left = {path.name for path in out.iterdir()} - {PROOF_WORK}  # no level may be whole yet
    assert left == {".lock", "manifest.json", "onnx", "quant"}
    monkeypatch.setattr(
        "exporter.proof.prove.validate", lambda *_: ValidationResult((), "", (NO_FLOATS,))
    )
    code, _, err = run(out, "--resume", "--until", "report")
    assert (
        code == 0
        and "quant: kept" in err
        and "onnx: kept" in err
        and (out / "report" / "index.html").exists()
        and not (out / ".proof").exists()
    )


# ---------------------------------------------------------------- what a stage depends on


@pytest.fixture
def world(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Everything that decides a result, to be touched: a copy of model and sources, a pretended
    GPU, TensorRT and packages.

    quant/ and onnx/ are real; the engine and the validation are stand-ins.
    """
    world = SimpleNamespace(
        model=tmp_path / "model",
        root=tmp_path / "sources",
        library=tmp_path / "libanybit_plugins.so",
        calib=tmp_path / "calib.txt",
        text=tmp_path / "text.txt",
        edition=Edition("tensorrt", "10.13"),
        gpus=["8.9"],
        versions={"torch": "1"},
    )
    shutil.copytree(tiny_model_dir, world.model)
    for package in ("calibration", "exporter", "plugins"):
        shutil.copytree(
            REPOSITORY / package, world.root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    world.library.write_bytes(b"library")
    world.calib.write_text("The river runs to the sea. " * 20)
    world.text.write_text("The river runs to the sea. " * 100)

    def build_engine(onnx: Path, library: Path, folder: Path, *_: Any) -> dict[str, Any]:
        record = ENGINE | {"edition": world.edition.name, "version": world.edition.version}
        write_json(folder / "engine.json", record)
        return record

    monkeypatch.setattr("calibration.out.fingerprint._ROOT", world.root)
    monkeypatch.setattr(
        "exporter.stages.package_versions",
        lambda names: {name: world.versions.get(name) for name in names},
    )
    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", lambda: world.gpus)
    monkeypatch.setattr("exporter.engine.build.select_edition", lambda choice: world.edition)
    monkeypatch.setattr("exporter.engine.build.build_engine", build_engine)
    monkeypatch.setattr("plugins.tools.build.build_library", lambda **_: world.library)
    found = ValidationResult((), "", (NO_FLOATS,))  # without floats nothing else is run either
    monkeypatch.setattr("exporter.proof.prove.validate", lambda *_: found)
    monkeypatch.setattr(
        "exporter.report.report.write_report",
        lambda folder, data: write_json(folder / "report.json", data),
    )
    return world


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n# touched")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("stage", "change", "options"),
    [
        ("nothing", lambda world: None, ()),
        ("nothing", lambda world: touch(world.model / "model.safetensors"), ()),
        ("nothing", lambda world: touch(world.model / "tokenizer.json"), ()),
        ("nothing", lambda world: append(world.model / "README.md"), ()),
        ("quant", lambda world: (world.model / "added_tokens.json").write_text("{}"), ()),
        ("quant", lambda world: append(world.root / "calibration" / "methods" / "rtn.py"), ()),
        ("quant", lambda world: append(world.root / "plugins" / "qqq_gemm" / "op.py"), ()),
        ("quant", lambda world: append(world.root / "plugins" / "abq_gemm" / "grid.py"), ()),
        ("quant", lambda world: append(world.root / "plugins" / "core" / "code_sets.py"), ()),
        ("quant", lambda world: append(world.root / "calibration" / "default_text.txt"), ()),
        (
            "quant",
            lambda world: append(world.calib),
            ("--calib", "CALIB", "--nsamples", "2", "--seqlen", "16"),
        ),
        ("quant", lambda world: world.versions.update(transformers="2"), ()),
        ("onnx", lambda world: append(world.root / "plugins" / "abq_gemm" / "body.py"), ()),
        ("onnx", lambda world: append(world.root / "exporter" / "graph" / "decoder.py"), ()),
        ("onnx", lambda world: append(world.root / "exporter" / "graph" / "nodes.py"), ()),
        ("onnx", lambda world: append(world.root / "exporter" / "graph" / "weights.py"), ()),
        ("engine", lambda world: append(world.root / "exporter" / "engine" / "build.py"), ()),
        ("engine", lambda world: append(world.root / "exporter" / "engine" / "edition.py"), ()),
        ("engine", lambda world: append(world.library), ()),
        ("engine", lambda world: setattr(world, "edition", Edition("tensorrt", "10.14")), ()),
        ("engine", lambda world: setattr(world, "gpus", ["9.0"]), ()),
        ("report", lambda world: setattr(world, "gpus", ["9.0"]), ("rtx",)),
        ("report", lambda world: append(world.root / "exporter" / "proof" / "limits.py"), ()),
        ("report", lambda world: append(world.root / "exporter" / "run" / "sessions.py"), ()),
        ("report", lambda world: world.versions.update(torch="2"), ()),
        ("report", lambda world: append(world.text), ("--eval", "TEXT", "--eval-windows", "1")),
    ],
)
def test_a_change_redoes_its_stage_and_what_follows(
    run: Run,
    world: SimpleNamespace,
    tmp_path: Path,
    stage: str,
    change: Callable[[SimpleNamespace], None],
    options: tuple[str, ...],
) -> None:
    if options == ("rtx",):
        world.edition, options = Edition("tensorrt-rtx", "1.7"), ()
    (world.model / "README.md").write_text("")
    paths = {"CALIB": str(world.calib), "TEXT": str(world.text)}
    arguments = [tmp_path / "out", *WHOLE, *(paths.get(option, option) for option in options)]
    code, _, err = run(*arguments, model=world.model)
    assert code == 0 and "kept" not in err
    change(world)
    code, _, err = run(*arguments, model=world.model)
    kept = [name for name in STAGES if f"{name}: kept, nothing changed" in err]
    assert code == 0 and kept == list(STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES)


def test_a_proof_goes_on_with_its_own_results_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the same texts, versions and files, and of the same native kernels."""
    kernels = tmp_path / "libanybit_onnxruntime.so"
    kernels.write_bytes(b"kernels")
    monkeypatch.setattr("exporter.run.native.native_library", lambda say: kernels)
    schemes = as_map(QuantScheme("ABQGemm", "rtn", 4, 8))
    request = ExportRequest(model="", schemes=schemes, out=tmp_path, resume=True)

    def goes_on(fingerprint: str = "print", request: ExportRequest = request) -> bool:
        stage = ReportStage(request, {}, NullProgress(), scored=None)
        stage.fingerprint = fingerprint
        pieces = stage._pieces()
        kept = bool(pieces.whole("level"))
        with pieces.made("level") as path:
            path.write_bytes(b"level")
        return kept

    assert [goes_on(), goes_on(), goes_on("other texts"), goes_on()] == [False, True, False, False]
    assert [goes_on(request=replace(request, resume=False)), goes_on()] == [False, True]
    kernels.write_bytes(b"other kernels")
    assert [goes_on(), goes_on()] == [False, True]


def test_a_library_that_cannot_be_made_is_told_before_any_work(
    run: Run, world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise InputError("libanybit_plugins.so", "got no folder that can be written", "Set one")

    monkeypatch.setattr("plugins.tools.build.build_library", refuse)
    whole = (*WHOLE, "--max-seq", "64")
    code, _, err = run(tmp_path / "out", *whole, model=world.model)
    assert code == 2 and err.splitlines()[1:] == [  # behind the estimate
        "libanybit_plugins.so: got no folder that can be written. Set one."
    ]
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", *whole, "--engine", "none", model=world.model)[0] == 0


def test_stages_that_follow_a_new_one_are_gone(
    run: Run, world: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stages() -> list[str]:
        listed = json.loads((out / "manifest.json").read_text())["stages"]
        on_disk = [path.name for path in out.iterdir() if path.is_dir()]
        assert sorted(on_disk) == sorted(listed)
        return sorted(listed)

    assert run(out, *WHOLE, model=world.model)[0] == 0
    assert stages() == sorted(STAGES)
    report = out / "report" / "report.json"
    assert json.loads(report.read_text())["engine"]["version"] == "10.13"
    append(world.root / "calibration" / "methods" / "rtn.py")
    assert run(out, *WHOLE, "--engine", "none", model=world.model)[0] == 0
    assert (
        stages() == ["onnx", "quant", "report"] and json.loads(report.read_text())["engine"] is None
    )
    append(world.root / "exporter" / "graph" / "decoder.py")
    (out / PROOF_WORK).mkdir()  # levels of another file
    assert run(out, *WHOLE, "--until", "onnx", model=world.model)[0] == 0
    assert stages() == ["onnx", "quant"] and not (out / PROOF_WORK).exists()


def test_a_stage_that_fails_keeps_what_follows(
    run: Run,
    world: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Callable[[Path], dict[str, bytes]],
) -> None:
    out = tmp_path / "out"
    assert run(out, *WHOLE, model=world.model)[0] == 0
    before = snapshot(out)
    append(world.root / "exporter" / "graph" / "decoder.py")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.graph.decoder, "export_onnx", fail)
    assert run(out, *WHOLE, model=world.model)[0] == EXIT_INPUT
    assert snapshot(out) == before
