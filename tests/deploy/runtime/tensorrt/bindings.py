"""Puts recorder.cpp in TensorRT's place under NVIDIA's Python bindings, and prints as JSON which
functions of which tables they call: bindings.py RECORDER MODULE EXTENSION.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Call each function once."""
    path, module, extension = sys.argv[1:4]
    recorder = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    recorder.calls.restype = ctypes.c_char_p
    for library in sys.argv[4:]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    loader = importlib.machinery.ExtensionFileLoader(module, extension)
    spec = importlib.util.spec_from_loader(module, loader)
    assert spec is not None
    trt = importlib.util.module_from_spec(spec)
    loader.exec_module(trt)
    answers: dict[str, list[str]] = {}
    kept = []  # TensorRT's objects must not be destroyed: they are none

    def hear(name: str, work: Callable[[], Any], returning: bytes = b"a text") -> Any:
        recorder.will_return(returning)
        recorder.calls()
        kept.append(work())
        answers[name] = sorted(set(recorder.calls().decode().splitlines()))
        return kept[-1]

    logger = trt.Logger()
    runtime = trt.Runtime(logger)
    blob = b"an engine"
    engine = hear("deserialize_engine", lambda: runtime.deserialize_cuda_engine(blob), b"engine")
    user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = hear(
        "create_context", lambda: engine.create_execution_context(user_managed), b"context"
    )
    hear("profiles", lambda: engine.num_optimization_profiles)
    hear("tensor_shape", lambda: engine.get_tensor_shape("x"))
    hear("tensor_type", lambda: engine.get_tensor_dtype("x"))
    hear("tensor_mode", lambda: engine.get_tensor_mode("x"))
    hear("profile_shape", lambda: engine.get_tensor_profile_shape("x", 0))
    hear("tensors", lambda: engine.num_io_tensors)
    hear("tensor_name", lambda: engine.get_tensor_name(0))
    hear("profile_memory", lambda: engine.get_device_memory_size_for_profile_v2(0))
    hear("set_profile", lambda: context.set_optimization_profile_async(0, 0))
    hear("set_shape", lambda: context.set_input_shape("x", (1, 2)))
    hear("set_address", lambda: context.set_tensor_address("x", 256))
    hear("enqueue", lambda: context.execute_async_v3(0))
    hear("set_memory", lambda: context.set_device_memory(256, 1000))
    hear("load_library", lambda: trt.get_plugin_registry().load_library("x"))
    print(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
