"""Gives an artifact an engine folder as the exporter would, but for the engine itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import onnx

from calibration.out.description import read_description, write_description
from calibration.out.files import file_records, write_json
from exporter.engine.build import EngineOptions, profile_shapes
from exporter.engine.limits import engine_limits
from exporter.engine.record import EngineRecord
from exporter.stages import copy_files
from tests.exporter.engine_cases import ENGINE

__all__ = ["add_engine"]


def add_engine(
    out: Path,
    *,
    engine: dict[str, Any] | None = None,
    plugins: bytes = b"no library",
    max_batch: int = 2,
    max_seq: int = 64,
    **changes: Any,
) -> Path:
    """Add a folder whose record fits the model; returns OUT.

    Args:
        out: with onnx and a manifest.
        engine: the JSON that stands for the engine; the profiles are added.
        plugins: the content of the plugin library.
        max_batch, max_seq: of the profiles.
        changes: of engine.json.
    """
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    folder = out / "engine"
    folder.mkdir()
    profiles = profile_shapes(dims, EngineOptions(max_batch=max_batch, max_seq=max_seq))
    text = "no engine" if engine is None else json.dumps(engine | {"profiles": profiles})
    (folder / "model.engine").write_text(text)
    (folder / "libanybit_plugins.so").write_bytes(plugins)
    record = ENGINE | {"profiles": profiles, "max_context": max_seq}
    description, records = read_description(out / "onnx" / "model.json", "")
    chat = [name for name in records if name == "chat.json"]
    copy_files(out / "onnx", (*description.tokenizer, *chat), folder)
    limits = asdict(engine_limits(cast(EngineRecord, record)))
    write_json(folder / "engine.json", record | changes)
    write_description(folder, description.within(**limits), file_records(folder))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"]["engine"] = {
        "fingerprint": "",
        "seconds": 1,
        "peak_rss": 1,
        "files": file_records(folder),
    }
    write_json(out / "manifest.json", manifest)
    return out
