"""Faults planted in a copy of an artifact, whose records are made to fit them: no checksum tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from calibration.out.description import read_description, write_description
from calibration.out.files import file_records, write_json
from calibration.out.json_file import read_json
from calibration.out.manifest import read_manifest

__all__ = ["change_graph", "change_tensor", "copy_of", "renew_records"]


def copy_of(whole: Path, out: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, out))


def renew_records(out: Path) -> None:
    """Make quant.json, model.json and the manifest tell what lies in OUT now."""
    path = out / "quant" / "quant.json"
    meta = read_json(path)
    found = file_records(out / "quant")
    write_json(path, meta | {"files": {name: found[name]["sha256"] for name in meta["files"]}})
    for stage in ("onnx", "engine"):
        description = out / stage / "model.json"
        if description.is_file():
            told, records = read_description(description, "")
            known = file_records(out / stage)
            write_description(
                out / stage, told, {name: known[name] for name in known if name in records}
            )
    manifest = read_manifest(out / "manifest.json")
    for stage, record in manifest["stages"].items():
        record["files"] = file_records(out / stage)
    write_json(out / "manifest.json", manifest)


def change_graph(out: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change OUT/onnx/model.onnx, and the records with it."""
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    renew_records(out)


def change_tensor(out: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change an initializer of OUT/onnx in place, and the records with it."""
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    offset = next(int(item.value) for item in tensor.external_data if item.key == "offset")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.memmap(out / "onnx" / "model.onnx.data", dtype, "r+", offset, tuple(tensor.dims))
    change(array)
    array.flush()
    renew_records(out)
