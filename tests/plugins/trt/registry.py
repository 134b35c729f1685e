"""Loads the plugin library into a real TensorRT and makes the plugins that a JSON list on stdin
asks for; prints JSON: registry.py LIBRARY MODULE, where the module is TensorRT's Python package.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import Any

import numpy as np

trt: Any = importlib.import_module(sys.argv[2])
OURS = "[anybit] "  # in front of what the library says where TensorRT has told it of no logger


class Recorder(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """TensorRT's callback."""
        if severity == trt.Logger.ERROR:
            self.errors.append(msg)


def make(registry: Any, request: dict[str, Any]) -> Any:
    """One plugin, or None; request holds op, fields, and dtype of the field values that are whole
    numbers.
    """
    dtypes = {
        name: "float32" if isinstance(value, float) else request["dtype"]
        for name, value in request["fields"].items()
    }
    values = {
        name: np.array(value, dtypes[name]).reshape(-1) for name, value in request["fields"].items()
    }
    fields = trt.PluginFieldCollection(
        [
            trt.PluginField(name, value, getattr(trt.PluginFieldType, dtypes[name].upper()))
            for name, value in values.items()
        ]
    )
    return registry.get_creator(request["op"], "1", "anybit").create_plugin(
        "layer0", fields, trt.TensorRTPhase.BUILD
    )


def main() -> None:
    """Run the requests."""
    registry = trt.get_plugin_registry()
    assert registry.load_library(sys.argv[1]) is not None
    recorder = Recorder()
    # From here on the library finds this logger. A lean runtime has no builder.
    builder = trt.Builder(recorder) if hasattr(trt, "Builder") else None
    stream = os.fdopen(os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR), "r+")
    os.dup2(stream.fileno(), 2)
    answer: dict[str, Any] = {"version": trt.__version__, "creators": [], "plugins": []}
    for creator in registry.all_creators:
        if creator.plugin_namespace == "anybit":
            answer["creators"].append(
                [
                    creator.name,
                    creator.plugin_version,
                    [field.name for field in creator.field_names],
                ]
            )
    for request in json.load(sys.stdin):
        recorder.errors.clear()
        stream.seek(0)
        stream.truncate()
        plugin = make(registry, request)
        stream.seek(0)
        said = [line[len(OURS) :].strip() for line in stream if line.startswith(OURS)]
        answer["plugins"].append({"made": plugin is not None, "errors": recorder.errors + said})
        del plugin
    del builder
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
