"""One exported tiny model for all deploy tests, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.engine_folder import add_engine


@pytest.fixture(scope="session")
def export() -> Callable[..., Path]:
    """export(model, out, scheme=None, **request) -> OUT of a model, W8A8 without a scheme, up to the
    ONNX file.
    """
    from calibration.progress import NullProgress
    from calibration.quant.bits import SchemeMap
    from calibration.quant.scheme import QuantScheme
    from exporter.pipeline import ExportRequest, run_pipeline

    def make(model: Path, out: Path, scheme: QuantScheme | None = None, **request: Any) -> Path:
        run_pipeline(
            ExportRequest(
                model=str(model),
                schemes=SchemeMap(scheme or QuantScheme("ABQGemm", "rtn", 8, 8)),
                out=out,
                until="onnx",
                offline=True,
                **request,
            ),
            NullProgress(),
        )
        return out

    return make


@pytest.fixture(scope="session")
def artifact(
    tiny_model_dir: Path,
    export: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """OUT of a tiny W8A8 model, up to the ONNX file. Do not change it."""
    return export(tiny_model_dir, tmp_path_factory.mktemp("deploy") / "out")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of OUT that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "out"))


@pytest.fixture
def pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """set(["8.9"]): pretend that a GPU of this compute capability, and TensorRT-RTX 1.7.1.116, are
    here.
    """
    from exporter.engine.edition import Edition

    def pretend(capabilities: list[str]) -> None:
        for module in ("engine.edition", "run.tensorrt"):
            monkeypatch.setattr(f"exporter.{module}.gpu_capabilities", lambda: capabilities)
        monkeypatch.setattr(
            "exporter.engine.edition._installed", lambda name: Edition(name, "1.7.1.116")
        )

    return pretend


@pytest.fixture
def engine_record(copy: Path) -> Callable[..., Path]:
    """make(**changes) -> OUT with an engine folder whose record fits the model; its engine file is
    no engine.
    """
    return lambda **changes: add_engine(copy, **changes)
