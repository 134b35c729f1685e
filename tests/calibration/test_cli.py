"""Arguments to scheme, and the command python -m calibration as a user runs it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.__main__ import main
from calibration.cli import (
    add_quant_arguments,
    default_out,
    model_slug,
    scheme_from_args,
    schemes_from_args,
    settings_from_args,
)
from calibration.methods.qqq.settings import QqqSettings
from calibration.out.files import locked
from calibration.quant.folder import read_quant
from calibration.settings import CalibrationSettings
from exporter.__main__ import main as exporter_main
from plugins.errors import InputError
from tests.conftest import FOUR_WINDOWS, W4A8
from tests.forks import run_command


def _args(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_quant_arguments(parser)
    return parser.parse_args(["llama-7b", *line.split()])


@pytest.mark.parametrize(
    ("line", "op", "symmetric", "label", "method"),
    [
        ("--wbits 4 --abits 8", "QQQGemm", True, "w4a8", "qqq"),
        ("--wbits 4 --abits 8 --group-size 64", "QQQGemm", True, "w4a8-g64", "qqq"),
        ("--wbits 4 --abits 8 --group-size 32", "ABQGemm", False, "w4a8-g32", "abq"),
        ("--wbits 4 --abits 8 --act-quant asym", "ABQGemm", False, "w4a8", "abq"),
        ("--wbits 4 --abits 8 --method abq", "ABQGemm", False, "w4a8", "abq"),
        ("--wbits 4 --abits 8 --method abq --act-quant sym", "ABQGemm", True, "w4a8", "abq"),
        ("--wbits 4 --abits 8 --method qqq", "QQQGemm", True, "w4a8", "qqq"),
        ("--wbits 4 --abits 8 --method rtn", "QQQGemm", True, "w4a8", "rtn"),
        ("--wbits 2b --abits 8", "ABQGemm", False, "w2ba8", "abq"),
        ("--wbits 2b --abits 8 --method rtn", "ABQGemm", False, "w2ba8", "rtn"),
        ("--wbits 1* --abits 8", "ABQGemm", False, "w1ba8", "abq"),
        ("--wbits 3 --abits 16 --act-quant sym", "ABQGemm", False, "w3a16", "abq"),
    ],
)
def test_scheme(line: str, op: str, symmetric: bool, label: str, method: str) -> None:
    args = _args(line)
    scheme = scheme_from_args(args)
    assert (scheme.op, scheme.act_symmetric, scheme.label, scheme.method) == (
        op,
        symmetric,
        label,
        method,
    )
    assert default_out(args, scheme) == Path("out") / f"llama-7b-{label}"


def test_a_bits_file_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "bits.txt"
    path.write_text("down_proj w8a8\n")
    args = _args(f"--wbits 4 --abits 8 --group-size 64 --bits-file {path}")
    schemes = schemes_from_args(args)
    assert schemes.base == scheme_from_args(args)
    assert [scheme.label for scheme in schemes.schemes()] == ["w4a8-g64", "w8a8-g64", "w8a8"]
    assert schemes.head == schemes.schemes()[-1] and schemes.head_limit == 0.001
    assert default_out(args, schemes.base) == Path("out/llama-7b-w4a8-g64-mixed")
    assert schemes_from_args(_args("--wbits 4 --abits 8")).rules == ()


def test_settings_of_the_method_that_the_scheme_names() -> None:
    args = _args(
        "--wbits 4 --abits 8 --effort fast --nsamples 3 --seed 7 --max-memory 0.5 --calib "
        "text.txt --set gptq=off --set damp=0.1"
    )
    settings = settings_from_args(args, scheme_from_args(args))
    assert settings == CalibrationSettings(
        "fast", "text.txt", 3, 512, 7, 500_000_000, QqqSettings(gptq=False, damp=0.1)
    )
    args = _args("--wbits 4 --abits 8 --method rtn")
    assert settings_from_args(args, scheme_from_args(args)) == CalibrationSettings()


@pytest.mark.parametrize("text", ["-1", "0", "1e-10", "much", "nan", "inf", "1e6", ""])
def test_memory_that_cannot_be(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _main("llama-7b", "--wbits", "4", "--abits", "8", f"--max-memory={text}")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: argument --max-memory: got {text!r}, expected gigabytes above 0, such as 8 or 0.5\n"
    )


def test_the_least_memory_puts_every_activation_on_the_disk() -> None:
    args = _args("--wbits 4 --abits 8 --max-memory 0.000000001")
    assert settings_from_args(args, scheme_from_args(args)).max_memory == 1


@pytest.mark.parametrize("option", ["--wbit", "--seq", "--max-mem"])
def test_abbreviated_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (main, exporter_main):
        with pytest.raises(SystemExit) as stop:
            command(["llama-7b", "--wbits", "4", "--abits", "8", option, "4"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {option} 4\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--wbits 9 --abits 8",
            "--wbits: got '9', expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
            "Give one of these; in a shell write 2b or '2*' for the balanced set.",
        ),
        (
            "--wbits 0 --abits 8",
            "--wbits: got '0', expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
            "Give one of these; in a shell write 2b or '2*' for the balanced set.",
        ),
        (
            "--wbits 4 --abits 1",
            "--abits: got 1, expected 2 to 8, or 16 for weight-only. Give one of these.",
        ),
        (
            "--wbits 4 --abits 9",
            "--abits: got 9, expected 2 to 8, or 16 for weight-only. Give one of these.",
        ),
        (
            "--wbits 4 --abits 4 --method qqq",
            "--method qqq: got W4A4, expected W4A8 with symmetric activations. "
            "Use --wbits 4 --abits 8, or --method abq for other bits.",
        ),
        (
            "--wbits 4 --abits 8 --method qqq --act-quant asym",
            "--method qqq: got W4A8 with asymmetric activations, expected W4A8 with symmetric "
            "activations. Use --wbits 4 --abits 8, or --method abq for other bits.",
        ),
        (
            "--wbits 4 --abits 8 --method qqq --group-size 32",
            "--method qqq: got group size 32, expected 0, 64 or 128. "
            "Use one of these, or --method abq.",
        ),
        (
            "--wbits 4 --abits 8 --method gptq",
            "method 'gptq': unknown, expected one of abq, qqq, rtn, or the path of a .py file. "
            "Check the spelling.",
        ),
        (
            "--wbits 4 --abits 8 --group-size -5",
            "--group-size: got -5, expected 0 or a positive number. "
            "Use 0 for one scale per output channel.",
        ),
    ],
)
def test_refusals(line: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        scheme_from_args(_args(line))
    assert str(caught.value) == message


def test_command_writes_the_quant_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(tiny_model_dir), *W4A8, *FOUR_WINDOWS, "--out", str(out), "--offline"]
    code, stdout, err = run_command(tmp_path, "calibration", *words, "--progress", "json")
    assert code == 0, err
    events = [json.loads(line) for line in stdout.splitlines()]
    assert [event["stage"] for event in events if event["event"] == "start"] == [
        "calibrate",
        "quant",
    ]
    told = [event["text"] for event in events if event["event"] == "message"]
    assert [text.split(":")[0] for text in told] == [
        "block 1 of 2",
        "block 2 of 2",
        "head w8a8",
        str(out / "quant"),
    ]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "quant"]
    quant = read_quant(out / "quant")
    assert (quant.scheme.label, quant.scheme.method) == ("w4a8", "qqq")


def _main(*arguments: str) -> int:
    """The command without a word and without the network; rounded to nearest unless a later
    --method says otherwise.
    """
    return main(
        [arguments[0], "--method", "rtn", *arguments[1:], "--progress", "none", "--offline"]
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_errors_are_one_line_exit_2_and_leave_nothing_behind(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # the last weight becomes NaN
    path.write_bytes(data)
    assert _main(str(damaged), "--wbits", "4", "--abits", "8", "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert "got nan at" in captured.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_quant_folder_of_another_model_or_setting_is_refused_and_kept(
    tiny_model_dir: Path,
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, folder = tmp_path / "out", tmp_path / "out" / "quant"
    bits = ("--wbits", "4", "--abits", "8", "--out", str(out))
    assert _main(str(tiny_model_dir), *bits) == 0
    before, fix = _files(folder), "Choose another --out, or delete this folder."
    other = tiny_llama(tie_word_embeddings=False)
    capsys.readouterr()
    assert _main(str(other), *bits) == 2
    assert capsys.readouterr().err == (
        f"{folder}: got one of another model or config (of "
        f"{model_slug(str(tiny_model_dir))}), "
        f"expected those of {model_slug(str(other))}. {fix}\n"
    )
    assert _main(str(tiny_model_dir), *bits, "--dtype", "float32") == 2
    assert (
        capsys.readouterr().err
        == f"{folder}: got a model quantised with dtype float16, expected dtype float32. {fix}\n"
    )
    assert _files(folder) == before
    assert _main(str(tiny_model_dir), *bits) == 0  # the same again may replace it
    (folder / "quant.json").unlink()
    assert _main(str(tiny_model_dir), *bits) == 2
    assert capsys.readouterr().err == (
        f"{folder}: got a folder without a readable quant.json (got no such file, expected a "
        f"JSON file). {fix}\n"
    )


def test_one_process_at_a_time(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        assert (
            _main(str(tiny_model_dir), "--wbits", "4", "--abits", "8", "--out", str(tmp_path)) == 2
        )
    assert capsys.readouterr().err == (
        f"{tmp_path}: got a folder that another process is writing, expected a free one. "
        "Wait for it to end or choose another --out.\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--nsamples", "0", 1), ("--seqlen", "1", 2)]
)
def test_numbers_of_calibration_windows(
    option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _main("llama-7b", "--wbits", "4", "--abits", "8", option, value)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: argument {option}: got {value}, expected at least {least}\n"
    )


def test_ctrl_c_exits_130_and_gives_the_terminal_back(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.live import Live

    lives: list[Live] = []
    start = Live.start
    monkeypatch.setattr(
        Live, "start", lambda self, refresh=False: (lives.append(self), start(self, refresh))[-1]
    )

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.quant.quantize.SafetensorsWriter.write", interrupt)
    out = tmp_path / "out"
    command = [
        str(tiny_model_dir),
        *W4A8,
        "--method",
        "rtn",
        "--out",
        str(out),
        "--progress",
        "rich",
        "--offline",
    ]
    assert main(command) == 130
    assert [live.is_started for live in lives] == [False]
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_out_that_the_exporter_keeps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert _main("llama-7b", "--wbits", "4", "--abits", "8", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err.endswith(
        f"{tmp_path}: got a folder with manifest.json, which python -m exporter keeps, expected another. "
        "Choose another --out, or run python -m exporter with --until quant.\n"
    )


def test_no_space_left(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil as module
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert (
        _main(str(tiny_model_dir), "--wbits", "4", "--abits", "8", "--out", str(tmp_path / "out"))
        == 2
    )
    assert "got 1 MB of free space, expected at least " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
