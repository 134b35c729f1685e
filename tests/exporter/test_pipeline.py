"""The whole way on a tiny model: stages, manifest, resume, and every way to refuse a folder or a setting."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exporter.graph
from exporter.__main__ import main
from plugins.core.errors import EXIT_CHECK, EXIT_INPUT, EXIT_INTERRUPT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(out, *more) -> (exit code, stdout, stderr) of the exporter on the tiny model, up to the ONNX stage."""

    def call(out: Path, *more: str, model: Path = tiny_model_dir, wbits: str = "4", abits: str = "8") -> tuple[int, str, str]:
        code = main([str(model), "--wbits", wbits, "--abits", abits, "--out", str(out), "--until", "onnx", "--engine", "none", "--offline",
                     "--progress", "plain", *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def snapshot(out: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"}


def refused(result: tuple[int, str, str], message: str) -> None:
    """Exit code 2 and one message, no traceback, as the last line on stderr."""
    code, _, err = result
    assert err.splitlines()[-1] == message
    assert code == EXIT_INPUT and "Traceback" not in err


def test_manifest_names_everything(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path / "out")
    assert code == 0 and "onnx" in stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == 1 and list(manifest["stages"]) == ["onnx", "quant"]
    assert manifest["request"]["scheme"]["method"] == "rtn" and manifest["request"]["scheme"]["op"] == "QQQGemm"
    assert manifest["versions"]["torch"].startswith("2.13.0") and manifest["command"][:3] == ["python", "-m", "exporter"]
    for stage, record in manifest["stages"].items():
        on_disk = {str(path.relative_to(tmp_path / "out" / stage)) for path in (tmp_path / "out" / stage).rglob("*") if path.is_file()}
        assert set(record["files"]) == on_disk and record["seconds"] > 0 and record["peak_rss"] > 1e6
    assert manifest["stages"]["onnx"]["facts"]["custom_nodes"] == 8


def test_same_command_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(tmp_path / name)[0] == 0
    first, second = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    first.pop("manifest.json"), second.pop("manifest.json")
    assert first == second


def test_resume_redoes_only_what_changed(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out)[0] == 0
    _, _, err = run(out, "--resume")
    assert "quant: kept, nothing changed\nonnx: kept, nothing changed\n" in err
    data = out / "onnx" / exporter.graph.DATA_FILE
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + b"\xff")
    _, _, err = run(out, "--resume")
    assert f"onnx: made again, {data}: got SHA-256" in err and "quant: kept" in err
    assert data.read_bytes() == whole


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_stage_that_dies_can_be_resumed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    out = tmp_path / "out"

    def die(quant: Any, folder: Path, progress: Any) -> None:
        (folder / "half").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(exporter.graph, "export_onnx", die)
        result = run(out)
    if isinstance(failure, KeyboardInterrupt):
        assert result[0] == EXIT_INTERRUPT
        assert result[2].splitlines()[-1] == "Interrupted; finished stages are kept. Run the same command with --resume to go on."
    else:
        refused(result, f"{out / 'onnx'}: got No space left on device while writing, expected a writable folder with enough space. "
                        "Check the disk and the permissions; earlier results are whole.")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "manifest.json", "quant"]
    code, _, err = run(out, "--resume")
    assert code == 0 and "quant: kept, nothing changed" in err and (out / "onnx" / "model.onnx").exists()


def test_a_full_disk_is_refused_before_writing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    code, _, err = run(tmp_path / "out")
    assert code == EXIT_INPUT
    assert err.splitlines()[-1].startswith(f"{tmp_path / 'out' / 'quant'}: got 1 MB of free space, expected at least ")
    assert err.endswith("Free some space or choose another --out.\n")
    assert not (tmp_path / "out" / "quant").exists()


def test_a_folder_of_another_setting_is_refused_and_kept(run: Run, tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    run(out)
    before = snapshot(out)
    refused(run(out, wbits="3"), f'{out}: got an artefact with scheme {{"act_symmetric": true, "op": "QQQGemm", "wbits": 4}}, expected '
            '{"op": "ABQGemm", "wbits": 3, "act_symmetric": false}. Choose another --out, or delete this folder.')
    other = tiny_llama(tie_word_embeddings=False)
    _, _, err = run(out, model=other)
    assert err.splitlines()[-1].endswith(f'expected "{other}". Choose another --out, or delete this folder.')
    assert snapshot(out) == before


def test_a_strangers_folder_is_refused_and_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(run(tmp_path), f"{tmp_path}: got a folder with other files in it (thesis.tex), expected a new or an artefact folder. "
            "Choose another --out.")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    refused(run(tmp_path / "thesis.tex"), f"{tmp_path / 'thesis.tex'}: got a file, expected a folder. Choose another --out.")


def test_a_damaged_manifest_is_refused(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "out"
    run(out)
    path = out / "manifest.json"
    path.write_text(path.read_text()[:100])
    code, _, err = run(out, "--resume")
    assert code == EXIT_INPUT and err.splitlines()[-1].startswith(f"{path}: got unreadable JSON (")
    path.write_text("{}")
    refused(run(out), f"{out}: got an artefact with model null, expected {json.dumps(str(tiny_model_dir))}. "
            "Choose another --out, or delete this folder.")


def test_two_exports_do_not_share_a_folder(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(run(out), f"{out}: got a folder that another export is writing, expected a free one. "
                "Wait for it to end or choose another --out.")


def test_bits_and_limits_out_of_range(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in (("--max-seq", "0"), ("--max-batch", "-1")):
        with pytest.raises(SystemExit) as caught:
            run(out, *more)
        assert caught.value.code == EXIT_INPUT
    refused(run(out, wbits="9"), "--wbits: got '9', expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
            "Give one of these; in a shell write 2b or '2*' for the balanced set.")
    refused(run(out, abits="9"), "--abits: got 9, expected 2 to 8, or 16 for weight-only. Give one of these.")
    assert not out.exists()


def test_json_progress_is_one_object_per_line(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path / "out", "--progress", "json")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0 and {line["stage"] for line in lines if line["event"] == "finish"} == {"quant", "onnx"}


def test_a_layer_out_of_tolerance_is_exit_3_after_the_report(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exporter.validate

    out = tmp_path / "out"
    assert run(out)[0] == 0
    scale = out / "onnx" / exporter.graph.DATA_FILE
    real = exporter.validate.validate

    def broken(folder: Path, options: Any, progress: Any) -> Any:
        data = bytearray(scale.read_bytes())
        data[:: len(data) // 500] = bytes(b ^ 0x10 for b in data[:: len(data) // 500])
        scale.write_bytes(bytes(data))
        return real(folder, options, progress)

    with monkeypatch.context() as patch:
        patch.setattr(exporter.validate, "validate", broken)
        code, _, err = run(out, "--resume", "--until", "report")
    assert code == EXIT_CHECK and err.splitlines()[-1].startswith(f"validation of {out}: ")
    assert (out / "report" / "index.html").exists()
    again, _, err = run(out, "--resume", "--until", "report")
    assert again in (0, EXIT_CHECK) and "onnx: made again" in err
