"""Exports of the tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_export(tiny_quant: Callable[..., Path], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(**scheme) -> OUT with quant/, onnx/ and a manifest that names the float model. Do not change it."""
    from calibration.artifact import write_json
    from calibration.quant_folder import read_quant
    from exporter.graph import export_onnx

    cache: dict[str, Path] = {}

    def make(**scheme: Any) -> Path:
        key = repr(sorted(scheme.items()))
        if key not in cache:
            out = tmp_path_factory.mktemp("export") / "out"
            shutil.copytree(tiny_quant(**scheme), out)
            (out / "onnx").mkdir()
            export_onnx(read_quant(out / "quant"), out / "onnx")
            write_json(out / "manifest.json", {"request": {"model": str(tiny_model_dir)}, "stages": {}})
            cache[key] = out
        return cache[key]

    return make
