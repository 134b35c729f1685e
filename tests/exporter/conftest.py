"""Exports of the tiny model, and the command line that makes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_export(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """make(fuse_norms=True, static=0, **scheme) -> OUT with quant/, onnx/ and a manifest that names
    the float model; `static` is the capacity of a static cache. Do not change it.
    """
    from calibration.out.description import write_description
    from calibration.out.files import file_records, write_json
    from calibration.quant.describe import describe
    from calibration.quant.folder import read_quant
    from exporter.graph.decoder import export_onnx
    from exporter.stages import copy_files

    cache: dict[str, Path] = {}

    def make(fuse_norms: bool = True, static: int = 0, **scheme: Any) -> Path:
        key = repr((fuse_norms, static, sorted(scheme.items())))
        if key not in cache:
            out = tmp_path_factory.mktemp("export") / "out"
            shutil.copytree(tiny_quant(**scheme), out)
            folder, quant = out / "onnx", read_quant(out / "quant")
            folder.mkdir()
            longest = static or None
            export_onnx(quant, folder, None, fuse_norms, longest, static=static > 0)
            made = describe(quant).static(static) if static else describe(quant)
            copy_files(quant.path, made.tokenizer, folder)
            write_description(folder, made, file_records(folder))
            stages = {
                name: {
                    "fingerprint": "",
                    "seconds": 1,
                    "peak_rss": 1,
                    "files": file_records(out / name),
                }
                for name in ("quant", "onnx")
            }
            manifest = {"format": 1, "request": {"model": str(tiny_model_dir)}, "stages": stages}
            write_json(out / "manifest.json", manifest)
            cache[key] = out
        return cache[key]

    return make


@pytest.fixture
def run(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(out, *more) -> (exit code, stdout, stderr) of the exporter on the tiny model, rounded to
    nearest, up to the ONNX stage.
    """
    from exporter.__main__ import main

    def call(
        out: Path, *more: str, model: Path = tiny_model_dir, wbits: str = "4", abits: str = "8"
    ) -> tuple[int, str, str]:
        code = main(
            [
                str(model),
                "--wbits",
                wbits,
                "--abits",
                abits,
                "--method",
                "rtn",
                "--out",
                str(out),
                "--until",
                "onnx",
                "--engine",
                "none",
                "--offline",
                "--progress",
                "plain",
                *more,
            ]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused() -> Callable[[tuple[int, str, str], str], None]:
    """refused(result of run, message): exit code 2 and one message, no traceback, as the last line
    on stderr.
    """

    def check(result: tuple[int, str, str], message: str) -> None:
        code, _, err = result
        assert err.splitlines()[-1] == message
        assert code == 2 and "Traceback" not in err

    return check


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """snapshot(out) -> every file of a folder but the lock."""

    def read(out: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read
