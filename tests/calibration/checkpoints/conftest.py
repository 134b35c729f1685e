"""The tiny model as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from tests.calibration.checkpoints.gguf_files import write_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", open_checkpoint(str(tiny_model_dir), True)
    )
