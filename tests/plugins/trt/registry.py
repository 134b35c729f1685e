"""Loads the plugin library into a real TensorRT and makes the plugins that a JSON list on stdin
asks for; prints JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tensorrt_rtx as trt


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
    builder = trt.Builder(recorder)  # from here on the library finds this logger
    answer: dict[str, Any] = {"creators": [], "plugins": []}
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
        plugin = make(registry, request)
        answer["plugins"].append({"made": plugin is not None, "errors": list(recorder.errors)})
        del plugin
    del builder
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
