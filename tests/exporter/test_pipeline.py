"""The whole way on a tiny model: stages, manifest, checks that fail, progress (resume:
test_resume.py, refusals: test_bad_input.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.out.layout import DATA_FILE
from exporter.proof.judge import LayerReport
from exporter.proof.result import ValidationResult
from plugins.errors import EXIT_CHECK, EXIT_INTERRUPT
from tests.conftest import FOUR_WINDOWS, W4A8
from tests.forks import run_command

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[[tuple[int, str, str], str], None]
TEXT = Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt"
ROW = LayerReport(
    "export",
    "prefill",
    "model.layers.0.output",
    0.99,
    17.0,
    1.0,
    0.14,
    0.2,
    None,
    "model.layers.0.mlp.product",
    1e-3,
    4e-3,
)


def test_manifest_names_everything(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path / "out")
    assert code == 0 and "onnx" in stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == 1 and list(manifest["stages"]) == ["onnx", "quant"]
    assert (
        manifest["request"]["scheme"]["method"] == "rtn"
        and manifest["request"]["scheme"]["op"] == "QQQGemm"
    )
    assert manifest["versions"]["torch"].startswith("2.13.0") and manifest["command"][:3] == [
        "python",
        "-m",
        "exporter",
    ]
    for stage, record in manifest["stages"].items():
        on_disk = {
            str(path.relative_to(tmp_path / "out" / stage))
            for path in (tmp_path / "out" / stage).rglob("*")
            if path.is_file()
        }
        assert (
            set(record["files"]) == on_disk and record["seconds"] > 0 and record["peak_rss"] > 1e6
        )
    assert manifest["stages"]["onnx"]["facts"]["custom_nodes"] == 8


def test_same_command_same_bytes(
    run_module: Any, snapshot: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Whatever the seed of hashes is: a fixed one, and a random one."""

    def words(out: str) -> list[str]:
        line = ["exporter", str(tiny_model_dir), *W4A8, *FOUR_WINDOWS, "--until", "onnx"]
        return [*line, "--offline", "--out", str(tmp_path / out)]

    done = run_module(*words("one"), PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    code, _, err = run_command(tmp_path, *words("two"))
    assert code == 0, err
    one, two = (snapshot(tmp_path / out) for out in ("one", "two"))
    del one["manifest.json"], two["manifest.json"]
    assert one == two and len(one) >= 6


def test_json_progress_is_one_object_per_line(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path / "out", "--progress", "json")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0 and {line["stage"] for line in lines if line["event"] == "finish"} == {
        "quant",
        "onnx",
    }


@pytest.mark.slow
def test_a_layer_out_of_tolerance_is_exit_3_after_the_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import exporter.proof.prove

    out = tmp_path / "out"
    assert run(out)[0] == 0
    scale = out / "onnx" / DATA_FILE
    real = exporter.proof.prove.validate

    def broken(*arguments: Any) -> Any:
        data = bytearray(scale.read_bytes())
        data[:: len(data) // 500] = bytes(b ^ 0x10 for b in data[:: len(data) // 500])
        scale.write_bytes(bytes(data))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(exporter.proof.prove, "validate", broken)
        code, _, err = run(out, "--resume", "--until", "report")
    assert code == EXIT_CHECK and err.splitlines()[-1].startswith(f"validation of {out}: ")
    assert (out / "report" / "index.html").exists()
    again, _, err = run(out, "--resume", "--until", "report")
    assert again == 0 and "onnx: made again" in err


def test_a_skipped_engine_is_said(run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "out", "--until", "engine")
    assert code == 0 and err.splitlines()[-1] == "engine: skipped, because of --engine none"


def test_auto_without_a_tensorrt_exports_and_says_how_to_get_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.engine.edition._installed", lambda name: None)
    code, _, err = run(tmp_path / "out", "--until", "engine", "--engine", "auto")
    assert code == 0 and err.splitlines()[-1] == (
        "engine: skipped: --engine auto: got no module tensorrt_rtx, expected it installed. pip "
        "install 'anybit-trt[rtx]' brings a TensorRT that needs no GPU to build, and its "
        "compiler; g++ is needed too. Then run the same command with --resume"
    )
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    assert not (tmp_path / "out" / "engine").exists()
    code, _, err = run(tmp_path / "new", "--until", "engine", "--engine", "tensorrt-rtx")
    assert code == 2 and err.startswith("--engine tensorrt-rtx: got no module tensorrt_rtx")


def test_auto_without_a_compiler_exports_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.engine.edition import Edition
    from plugins.tools import toolkit

    monkeypatch.setattr("exporter.engine.edition._installed", lambda name: Edition(name, "1.7"))
    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", list)
    monkeypatch.setattr(toolkit, "_wheel_root", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    code, _, err = run(tmp_path / "out", "--until", "engine", "--engine", "auto")
    assert code == 0
    assert err.splitlines()[-1].startswith("engine: skipped: CUDA compiler: got no nvcc")
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_a_gpu_that_the_edition_does_not_list_is_said(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.engine.edition import Edition

    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", lambda: ["9.0"])
    monkeypatch.setattr(
        "exporter.engine.edition._installed",
        lambda name: Edition(name, "1.7") if name == "tensorrt-rtx" else None,
    )

    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plugins.tools.build.build_library", stop)
    code, _, err = run(tmp_path / "out", "--until", "engine", "--engine", "auto")
    assert code == EXIT_INTERRUPT and err.splitlines()[0] == (
        "engine: got a GPU of compute capability 9.0, which tensorrt-rtx 1.7 does not list (7.5, "
        "8.0, 8.6, 8.9 and 12.x); for its own edition: pip install tensorrt"
    )


def test_a_run_ends_with_the_report_and_the_next_command(
    run: Run, proof: Callable[[str], None], tmp_path: Path, tiny_model_dir: Path
) -> None:
    proof("")
    out = tmp_path / "out"
    _, stdout, _ = run(out, "--until", "quant")
    assert stdout.splitlines()[-1] == (
        f"Next: python -m exporter {tiny_model_dir} --wbits 4 --abits 8 --method rtn --out {out} "
        f"--engine none --offline --progress plain --until report --resume"
    )
    generate = f"Next: python -m deploy generate {out} --prompt 'Once upon a time'"
    _, stdout, _ = run(out, "--resume")
    assert stdout.splitlines()[-1] == generate
    _, stdout, _ = run(out, "--resume", "--until", "report")
    assert stdout.splitlines()[-2:] == [f"Report: {out / 'report' / 'index.html'}", generate]


# ---------------------------------------------------------------- --eval


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """proof(first failure): what the validation finds from here on."""

    def find(failure: str) -> None:
        result = ValidationResult(
            (ROW,), failure, (), {"tokens": 8, "steps": 0, "text": "default", "seconds": 1.0}
        )
        monkeypatch.setattr("exporter.proof.prove.validate", lambda *_: result)

    return find


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    return report


def test_perplexity_in_the_report(run: Run, proof: Callable[[str], None], tmp_path: Path) -> None:
    proof("")
    options = ("--until", "report", "--eval", str(TEXT), "--eval-windows", "2")
    assert run(tmp_path / "out", *options)[0] == 0
    perplexity = report_of(tmp_path / "out")["perplexity"]
    assert perplexity["windows"] == 2 and perplexity["seqlen"] == 256
    assert "report: kept" in run(tmp_path / "out", *options, "--resume")[2]
    assert "report: kept" not in run(tmp_path / "out", "--until", "report", "--resume")[2]


def test_a_text_with_fewer_windows_is_scored_whole(
    run: Run, proof: Callable[[str], None], tmp_path: Path
) -> None:
    proof("")
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea. " * 60)
    assert (
        run(tmp_path / "out", "--until", "report", "--eval", str(text), "--eval-windows", "50")[0]
        == 0
    )
    assert 1 <= report_of(tmp_path / "out")["perplexity"]["windows"] < 50


def test_nan_perplexity_is_exit_3_after_the_report(
    run: Run, proof: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", ("--until", "report", "--eval", str(TEXT))
    proof("")
    monkeypatch.setattr(
        "exporter.proof.perplexity.window_nll", lambda session, window: float("nan")
    )
    for more in ((), ("--resume",)):
        code, _, err = run(out, *options, *more)
        assert code == EXIT_CHECK
        assert err.splitlines()[-1] == (
            f"validation of {out}: perplexity of default_text.txt, window 0: got a mean "
            f"negative log-"
            f"likelihood of nan, expected a finite perplexity. See {out / 'report' / 'index.html'}."
        )
    assert "report: kept" in err and report_of(out)["perplexity"] is None
    assert "perplexity of default_text.txt" in (out / "report" / "index.html").read_text()


def test_a_model_out_of_tolerance_is_not_scored(
    run: Run, proof: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof("layer 0 is wrong")
    monkeypatch.setattr("exporter.proof.perplexity.window_nll", None)
    code, _, err = run(tmp_path / "out", "--until", "report", "--eval", str(TEXT))
    assert code == EXIT_CHECK and err.splitlines()[-1].startswith(
        f"validation of {tmp_path / 'out'}: layer 0 is wrong. See "
    )
    assert report_of(tmp_path / "out")["validation"]["notes"] == [
        "The perplexity was not scored, because a layer is out of tolerance."
    ]


def test_a_bad_eval_text_is_refused_early(run: Run, refused: Refused, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    options = ("--until", "report", "--eval", str(text))
    refused(
        run(out, *options),
        f"--eval: got no such file {text}, expected a text file. Check the path.",
    )
    assert not out.exists()
    text.write_text("")
    refused(
        run(out, *options),
        f"--eval: got {text} with no text in it. Give a file with at least a few thousand words.",
    )
    text.write_text("a")
    refused(
        run(out, *options),
        f"--eval: got {text} with 1 tokens, expected at least one window of 256. Give a longer text.",
    )
    assert not out.exists()


@pytest.mark.parametrize("code", [EXIT_INTERRUPT, EXIT_CHECK])
def test_the_terminal_is_given_back(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from rich.live import Live

    from plugins.errors import CheckError

    lives: list[Live] = []
    start = Live.start
    monkeypatch.setattr(
        Live, "start", lambda self, refresh=False: (lives.append(self), start(self, refresh))[-1]
    )

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt if code == EXIT_INTERRUPT else CheckError("a", "b", "c")

    monkeypatch.setattr("calibration.quant.quantize.SafetensorsWriter.write", fail)
    assert run(tmp_path / "out", "--progress", "rich")[0] == code
    assert [live.is_started for live in lives] == [False]
