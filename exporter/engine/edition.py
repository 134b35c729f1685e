"""Which TensorRT is used: the data-centre edition or TensorRT for RTX; both are driven the same way
from here on.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.out.files import sha256_file
from calibration.out.layout import ENGINE_FILE
from exporter.engine.record import EngineRecord, read_engine_record
from plugins import library_ops
from plugins.core.op_spec import DOMAIN
from plugins.errors import CheckError, InputError
from plugins.tools.build import build_soname

__all__ = [
    "EDITIONS",
    "Edition",
    "captured_log",
    "check_engine",
    "edition_warning",
    "gpu_capabilities",
    "load_plugins",
    "prepare_parser",
    "select_edition",
]

EDITIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # edition -> Python module
_INSTALL = {
    "tensorrt": "pip install tensorrt (needs NVIDIA's package index and a GPU)",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13==1.7.1.116",
}
_EXPECTED = "has Int64 binding."  # said of every int64 model input
_RTX_CAPABILITIES = re.compile(r"7\.5|8\.[069]|12\.\d+")  # NVIDIA's list for TensorRT-RTX 1.7
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Edition:
    """An installed TensorRT."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def activate(self) -> Any:
        """Point Polygraphy at this edition, once per process; returns the tensorrt module.

        Raises:
            InputError: this process already uses the other edition.
        """
        rtx = self.name == "tensorrt-rtx"
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))
        from polygraphy import config

        if rtx != config.USE_TENSORRT_RTX:
            if "polygraphy.backend.trt" in sys.modules:
                raise InputError(
                    "TensorRT",
                    f"got {self.name} in a process that uses the other edition, expected one edition",
                    "Start a new process for the other edition",
                )
            config.USE_TENSORRT_RTX = rtx
        return importlib.import_module(EDITIONS[self.name])


def _installed(name: str) -> Edition | None:
    try:
        return Edition(name, str(importlib.import_module(EDITIONS[name]).__version__))
    except (
        ImportError,
        OSError,
        AttributeError,
    ):  # PyPI's `tensorrt` may be there without its libraries
        return None


def gpu_capabilities() -> list[str]:
    """Compute capability of every GPU here, such as ["9.0"]; empty where there is no GPU or no
    driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []

    def attribute(which: int, device: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return [
        f"{attribute(_COMPUTE_CAPABILITY_MAJOR, device)}.{attribute(_COMPUTE_CAPABILITY_MINOR, device)}"
        for device in range(count.value)
    ]


def select_edition(choice: str = "auto") -> Edition:
    """The edition to use: auto takes tensorrt where it imports and a GPU is there, else
    tensorrt-rtx.

    Raises:
        InputError: the edition is unknown, not installed, or needs a GPU that is not there.
    """
    if choice not in ("auto", *EDITIONS):
        raise InputError(
            "--engine",
            f"got {choice!r}, expected auto, {' or '.join(EDITIONS)}",
            "Choose one of these",
        )
    has_gpu = bool(gpu_capabilities())
    if choice == "tensorrt" and not has_gpu:
        raise InputError(
            "--engine tensorrt",
            "got no CUDA device, expected one: this edition builds for the GPU it runs on",
            "Use --engine tensorrt-rtx, which needs no GPU to build, or run on a machine with a GPU",
        )
    wanted = (
        [choice]
        if choice != "auto"
        else ["tensorrt", "tensorrt-rtx"]
        if has_gpu
        else ["tensorrt-rtx"]
    )
    for name in wanted:
        if edition := _installed(name):
            return edition
    modules = " or ".join(EDITIONS[name] for name in wanted)
    raise InputError(
        f"--engine {choice}",
        f"got no module {modules}, expected it installed",
        "; or ".join(_INSTALL[name] for name in wanted) + "; or use --engine none",
    )


def edition_warning(edition: Edition) -> str:
    """What speaks against running this edition's engines on the GPUs here; "" where nothing does."""
    strangers = [
        capability
        for capability in gpu_capabilities()
        if edition.name == "tensorrt-rtx" and not _RTX_CAPABILITIES.fullmatch(capability)
    ]
    if not strangers:
        return ""
    return (
        f"got a GPU of compute capability {strangers[0]}, which {edition} does not list (7.5, 8.0, "
        f"8.6, 8.9 and 12.x); for its own edition: pip install tensorrt"
    )


def prepare_parser(edition: Edition) -> None:
    """Make the name libtensorrt_rtx.so resolvable, which TensorRT-RTX's ONNX parser opens when it
    meets a plugin.

    The wheel ships only libtensorrt_rtx.so.1, and the parser aborts the process when the name
    without the suffix is missing.
    """
    if edition.name != "tensorrt-rtx":
        return
    for library in _mapped(r"libtensorrt_rtx\.so[.\d]+"):
        ctypes.CDLL(str(build_soname(library, "libtensorrt_rtx.so")), mode=ctypes.RTLD_GLOBAL)


def _mapped(name: str) -> list[Path]:
    """Files of this process's memory map whose base name matches the pattern `name`; a deleted one
    ends in " (deleted)".
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return sorted(
        {
            Path(path)
            for path in re.findall(rf"(/\S.*/{name}(?: \(deleted\))?)$", maps, re.MULTILINE)
        }
    )


def load_plugins(edition: Edition, library: Path) -> None:
    """Register our plugins with TensorRT, once per process; a second call with an equal library
    does nothing.

    They stay registered: a network or engine that outlives its library crashes the process when it
    is destroyed.

    Raises:
        InputError: the library does not load, or the process holds a different one. CheckError: it
            lacks an op.
    """
    registry = edition.activate().get_plugin_registry()
    missing = _missing(registry)
    if len(missing) < len(library_ops()):
        here = sha256_file(library)
        if not any(
            path.is_file() and sha256_file(path) == here
            for path in _mapped(re.escape(library.name))
        ):
            raise InputError(
                str(library),
                "got a second plugin library in one process, expected the one that is loaded",
                "Start a new process for it",
            )
        return
    if registry.load_library(str(library)) is None:
        raise InputError(
            str(library),
            f"got a library that {edition} cannot load, expected the plugin library",
            "Build it again with: python -m plugins build",
        )
    if missing := _missing(registry):
        raise CheckError(
            str(library),
            f"got no plugin for {', '.join(missing)}, expected {', '.join(library_ops())}",
            "Build it again with: python -m plugins build",
        )


def _missing(registry: Any) -> list[str]:
    found = {
        creator.name for creator in registry.all_creators if creator.plugin_namespace == DOMAIN
    }
    return [name for name in library_ops() if name not in found]


class _Collector(logging.Handler):
    """Keeps what TensorRT and Polygraphy say; repeats are dropped."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if text.endswith(_EXPECTED):
            return
        texts = self.errors if record.levelno >= logging.ERROR else self.warnings
        if text not in texts:
            texts.append(text)


@contextmanager
def captured_log() -> Iterator[_Collector]:
    """Collect warnings and errors of Polygraphy and, through it, of TensorRT instead of printing
    them.
    """
    from polygraphy.logger import G_LOGGER

    logger, collector = logging.getLogger("Polygraphy"), _Collector()
    settings = {
        "use_python_logging_system": True,
        "colors": False,
        "letter": False,
        "line_info": False,
    }
    before = {name: getattr(G_LOGGER, name) for name in settings}
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    for name, value in settings.items():
        setattr(G_LOGGER, name, value)
    try:
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            yield collector
    finally:
        for name, value in before.items():
            setattr(G_LOGGER, name, value)
        logger.removeHandler(collector)
        logger.propagate = propagate


def check_engine(folder: Path) -> EngineRecord:
    """Check that the engine in `folder` fits the TensorRT and the GPU that are here; returns its
    engine.json.

    Raises:
        InputError: engine.json is damaged, or it was built by another edition or version, or for
            another GPU.
    """
    record = read_engine_record(folder)
    where, fix = (
        str(folder / ENGINE_FILE),
        "Build the engine again on this machine (python -m exporter ... --resume)",
    )
    made_by = Edition(record["edition"], record["version"])
    installed = _installed(made_by.name)
    if installed is None:
        raise InputError(
            where,
            f"got an engine of {made_by}, expected that edition to be installed",
            _INSTALL[made_by.name],
        )
    if installed != made_by:
        raise InputError(
            where, f"got an engine of {made_by}, expected one of the installed {installed}", fix
        )
    here, built_for = gpu_capabilities(), record["compute_capabilities"]
    if built_for and here and here[0] not in built_for:
        raise InputError(
            where,
            f"got an engine for compute capability {', '.join(built_for)}, expected {here[0]}",
            fix,
        )
    return record
