"""python -m deploy doctor: what this machine has, what that allows, and how to get what is missing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.command import Command
from plugins.cores import allowed_memory, free_memory, usable_cores, usable_memory

__all__ = ["COMMAND", "Finding", "findings"]

_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        kind: "has" for a part of the machine, "can" for what the parts allow.
        name: what.
        found: its version, size or state; "" where it is not there.
        fix: the command, or the step, that mends a gap; "" where there is none.
    """

    kind: str
    name: str
    found: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is there."""
        return bool(self.found)


def findings(folder: Path) -> list[Finding]:
    """Everything about this machine; `folder` is where artifacts would go. Nothing is compiled."""
    parts = list(_parts(folder))
    return [*parts, *_abilities({part.name: part for part in parts})]


def _parts(folder: Path) -> Iterator[Finding]:
    yield _gpu()
    for module, package in (
        ("tensorrt", "pip install tensorrt"),
        ("tensorrt_rtx", "pip install 'anybit-trt[rtx]'"),
        ("polygraphy", "pip install 'anybit-trt[rtx]'"),
        ("onnxruntime", "pip install onnxruntime"),
        ("torch", "pip install torch==2.13.0"),
    ):
        yield Finding("has", module, _version(module), package)
    yield _nvcc()
    yield Finding("has", "g++", _program("g++"), "apt install g++")
    yield Finding("has", "trtexec", _program("trtexec"), "Install TensorRT's command line tools")
    yield _library("native kernels", "libanybit_onnxruntime.so", "python -m plugins cpu")
    yield _library("plugin library", "libanybit_plugins.so", "python -m plugins build")
    yield Finding("has", "CPU", _cpu())
    yield Finding("has", "memory", _memory())
    free = shutil.disk_usage(folder).free
    yield Finding("has", "disk", f"{free / 1e9:.1f} GB free at {folder.resolve()}")


def _gpu() -> Finding:
    from exporter.engine.edition import gpu_capabilities

    found = gpu_capabilities()
    text = ", ".join(f"compute capability {capability}" for capability in found)
    if text and (version := _driver_version()):
        text += f"; driver {version}"
    driver = "Install NVIDIA's driver, or run on a machine with an NVIDIA GPU"
    return Finding("has", "GPU", text, driver)


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of NVIDIA's kernel module; "" where the system does not say."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text, re.MULTILINE)
    return found[1] if found else ""


def _version(module: str) -> str:
    """Of a module that imports; a package may be there without its libraries."""
    try:
        return str(importlib.import_module(module).__version__)
    except Exception:  # libraries raise what they like where a driver or a file is missing
        return ""


def _nvcc() -> Finding:
    from plugins.errors import InputError
    from plugins.tools.toolkit import find_cuda

    try:
        release = re.search(r"release [\d.]+", find_cuda().version())
        return Finding("has", "nvcc", release[0] if release else "there")
    except (InputError, OSError) as error:
        fix = error.fix if isinstance(error, InputError) else ""
        return Finding("has", "nvcc", "", fix or "pip install 'anybit-trt[cuda]'")


def _program(name: str) -> str:
    return shutil.which(name) or ""


def _library(name: str, file: str, command: str) -> Finding:
    from plugins.tools.build import build_folders

    paths = [folder / file for folder in build_folders() if (folder / file).is_file()]
    return Finding("has", name, str(paths[0]) if paths else "", command)


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    features = ", ".join(feature for feature in _FEATURES if feature in there)
    model = name[1] if name else platform.machine()
    usable, there_are = usable_cores(), os.cpu_count()
    cores = f"{usable} threads" if usable == there_are else f"{usable} of {there_are} threads"
    return f"{model}, {cores} to be used; {features or 'no AVX2'}"


def _memory() -> str:
    usable, free, room = usable_memory(), free_memory(), allowed_memory()
    if usable is None:
        return "unknown"
    limited = room is not None and (free is None or room < free)
    return f"{usable / 1e9:.1f} GB free{', as a control group allows' if limited else ''}"


def _abilities(parts: dict[str, Finding]) -> Iterator[Finding]:
    """What the parts allow: by every way of doing it the first part that is missing."""
    kernels = "native kernels" if parts["native kernels"].ok else "g++"  # which compiles them
    tensorrt = "tensorrt" if parts["tensorrt"].ok and parts["GPU"].ok else "tensorrt_rtx"
    can = {
        "quantize and export": ("torch",),
        "run with onnxruntime": ("onnxruntime",),
        "run with native kernels": ("onnxruntime", kernels),
        "build an engine": (tensorrt, "polygraphy", "nvcc", "g++"),
        "run an engine": ("GPU", tensorrt, "polygraphy"),
        "prove an export": ("torch", "onnxruntime", "polygraphy"),
        "prove an engine": ("GPU", tensorrt, "polygraphy", "torch", "onnxruntime"),
        "time with trtexec": ("GPU", "trtexec"),
    }
    warning = _warning(tensorrt, parts)
    for name, needs in can.items():
        missing = next((parts[need] for need in needs if not parts[need].ok), None)
        if missing is not None:
            yield Finding("can", name, "", f"no {missing.name}: {missing.fix}")
        elif warning and {"GPU", tensorrt} <= set(needs):
            yield Finding("can", name, "", warning)
        else:
            yield Finding("can", name, "yes")


def _warning(tensorrt: str, parts: dict[str, Finding]) -> str:
    """What speaks against running engines of this TensorRT on the GPU here."""
    from exporter.engine.edition import EDITIONS, Edition, edition_warning

    name = next(edition for edition, module in EDITIONS.items() if module == tensorrt)
    return edition_warning(Edition(name, parts[tensorrt].found))


class Doctor(Command):
    """Prints what is there, what is possible, and what to do."""

    name = "doctor"
    help = "what this machine can do, and what it lacks"
    description = (
        "Look at GPU, TensorRT, compilers, ONNX Runtime, CPU, memory and disk; say what they allow, "
        "and the command that mends each gap."
    )
    out_help = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How to print it."""
        parser.add_argument("--json", action="store_true", help="print one line of JSON")

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Look and print."""
        from plugins.text import printable

        found = findings(out)
        if args.json:
            print(json.dumps([asdict(item) | {"ok": item.ok} for item in found]))
            return
        width = max(len(item.name) for item in found)
        for item in found:
            text = item.found or f"no ({item.fix})"
            print(f"{item.kind}  {item.name:<{width}}  {printable(text)}")


COMMAND = Doctor()
