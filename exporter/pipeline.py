"""The stages from a model to a proven engine: their folders, their fingerprints, the manifest, and resume."""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.artifact import StageWriter, file_records, read_json, sha256_file, verify_files, write_json
from calibration.progress import Progress
from plugins.core.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.scheme import QuantScheme

__all__ = ["STAGES", "ExportRequest", "check_out", "run_pipeline"]

STAGES = ("quant", "onnx", "engine", "report")
MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "polygraphy", "tensorrt-rtx-cu13", "tensorrt", "numpy", "nvidia-cuda-nvcc")


@dataclass(frozen=True)
class ExportRequest:
    """Everything the command line asks for.

    Attributes:
        model: alias, hub id, Hugging Face folder or .gguf file.
        scheme: the quantisation settings.
        out: the artefact folder.
        calib: text file or dataset for calibration and validation; None is the text shipped with the project.
        nsamples, seqlen: calibration windows and their length in tokens.
        engine: "auto", "tensorrt", "tensorrt-rtx" or "none".
        max_batch, max_seq: largest batch and context of the engine's profiles.
        until: the last stage to run, one of STAGES.
        resume: keep finished stages whose inputs did not change.
        offline: never use the network.
        command: the command line, for the manifest and the report.
    """

    model: str
    scheme: QuantScheme
    out: Path
    calib: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    engine: str = "auto"
    max_batch: int = 1
    max_seq: int = 2048
    until: str = "report"
    resume: bool = False
    offline: bool = False
    command: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What makes an OUT folder belong to this request: another model or setting needs another folder."""
        return {"model": self.model, "scheme": self.scheme.as_dict(), "calib": self.calib or "default",
                "nsamples": self.nsamples, "seqlen": self.seqlen}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _code_digest(*patterns: str) -> str:
    root = Path(__file__).resolve().parent.parent
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return _digest(*(sha256_file(path) for path in files))


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("anybit-trt", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _peak_rss() -> int:
    """Peak resident bytes since the last reset (Linux VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak_rss() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # the peak then counts earlier stages too


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time in an OUT folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(str(out), f"got {error.strerror}, expected a folder that can be written", "Choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(str(out), "got a folder that another export is writing, expected a free one",
                             "Wait for it to end or choose another --out") from None
        yield


def check_out(request: ExportRequest) -> dict[str, Any]:
    """The manifest of OUT, fresh or existing.

    Raises:
        InputError: OUT is not ours, or belongs to another model or setting, or its manifest is damaged.
    """
    path = request.out / MANIFEST
    if request.out.exists() and not request.out.is_dir():
        raise InputError(str(request.out), "got a file, expected a folder", "Choose another --out")
    if not path.exists():
        strangers = [entry.name for entry in request.out.iterdir() if not entry.name.startswith(".")] if request.out.exists() else []
        if strangers:
            raise InputError(str(request.out), f"got a folder with other files in it ({strangers[0]}), "
                             "expected a new or an artefact folder", "Choose another --out")
        return {"format": 1, "request": request.identity(), "stages": {}}
    manifest = read_json(path)
    for key, expected in request.identity().items():
        got = manifest.get("request", {}).get(key)
        if got != expected:
            raise InputError(str(request.out), f"got an artefact with {key} {_short(got, expected)}, expected {_short(expected, got)}",
                             "Choose another --out, or delete this folder")
    if not isinstance(manifest.get("stages"), dict):
        raise InputError(str(path), "got no stages, expected the manifest of an artefact folder", "It is damaged: delete this folder")
    return manifest


def _short(value: Any, other: Any) -> str:
    """A value for a message; of two dicts only what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    return json.dumps(value)


class Pipeline:
    """Runs the stages of one request and keeps OUT/manifest.json true after each."""

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        self.request = request
        self.progress = progress
        self.manifest = check_out(request)
        self.fingerprint = ""

    def stage(self, name: str, inputs: Any, work: Callable[[StageWriter], dict[str, Any] | None], needed_bytes: int = 0) -> bool:
        """Run one stage, or keep its finished result when resuming; returns whether it ran.

        Args:
            inputs: whatever the result depends on besides the stage before.
            work: writes the stage's files into the writer's path; what it returns goes into the manifest.
        """
        self.fingerprint = _digest(self.fingerprint, name, inputs)
        record = self.manifest["stages"].get(name)
        if self.request.resume and record and record["fingerprint"] == self.fingerprint and self._whole(name, record):
            self.progress.message(f"{name}: kept, nothing changed")
            return False
        _reset_peak_rss()
        began = time.monotonic()
        with StageWriter(self.request.out, name, needed_bytes) as writer:
            facts = work(writer) or {}
            files = file_records(writer.path)
        record = {"fingerprint": self.fingerprint, "seconds": round(time.monotonic() - began, 2), "peak_rss": _peak_rss(), "files": files}
        stages = {key: value for key, value in self.manifest["stages"].items() if key in STAGES[: STAGES.index(name)]}
        self.manifest["stages"] = {**stages, name: record | ({"facts": facts} if facts else {})}
        self.manifest |= {"versions": _versions(), "command": list(self.request.command)}
        write_json(self.request.out / MANIFEST, self.manifest)
        return True

    def _whole(self, name: str, record: dict[str, Any]) -> bool:
        try:
            verify_files(self.request.out / name, record["files"])
        except InputError as error:
            self.progress.message(f"{name}: made again, {error.where}: {error.problem}")
            return False
        return True

    def run(self) -> dict[str, Any]:
        """Run every stage up to request.until; returns the manifest.

        Raises:
            InputError: bad input. CheckError: plugin layers are missing, or a layer is out of tolerance.
        """
        wanted = STAGES[: STAGES.index(self.request.until) + 1]
        steps = {"quant": self._quant, "onnx": self._onnx, "engine": self._engine, "report": self._report}
        edition = self._edition() if "engine" in wanted else None
        for name in wanted:
            if name != "engine" or edition is not None:
                steps[name]()
        return self.manifest

    def _edition(self) -> str | None:
        """Check that an engine can be built before hours of other work."""
        if self.request.engine == "none":
            return None
        from exporter.engine import select_edition

        return str(select_edition(self.request.engine))

    def _quant(self) -> None:
        from calibration.checkpoint import open_checkpoint
        from calibration.quantize import QuantizeOptions, check_scheme, quant_bytes, quantize_model

        request = self.request
        checkpoint = open_checkpoint(request.model, request.offline)
        check_scheme(checkpoint, request.scheme)
        options = QuantizeOptions(request.offline, request.calib, request.nsamples, request.seqlen)
        inputs = [checkpoint.fingerprint, request.identity(), _code_digest("calibration/**/*.py", "plugins/core/*.py", "plugins/*/op.py")]
        self.stage("quant", inputs, lambda writer: quantize_model(checkpoint, request.scheme, options, writer.path, self.progress),
                   needed_bytes=quant_bytes(checkpoint, request.scheme))

    def _onnx(self) -> None:
        from calibration.quant_folder import read_quant
        from exporter.graph import export_onnx

        folder = self.request.out / "quant"
        size = sum(record["bytes"] for record in self.manifest["stages"]["quant"]["files"].values())
        inputs = _code_digest("exporter/graph.py", "exporter/nodes.py", "exporter/weights.py", "plugins/core/*.py", "plugins/*/op.py")
        self.stage("onnx", inputs, lambda writer: export_onnx(read_quant(folder), writer.path, self.progress), needed_bytes=size)

    def _engine(self) -> None:
        from exporter.engine import EngineOptions, build_engine, select_edition
        from exporter.graph import MODEL_FILE
        from plugins.build import build_library

        request = self.request
        options = EngineOptions(edition=request.engine, max_batch=request.max_batch, max_seq=request.max_seq)
        library = build_library()
        size = sum(record["bytes"] for record in self.manifest["stages"]["onnx"]["files"].values())

        def work(writer: StageWriter) -> dict[str, Any]:
            record = build_engine(request.out / "onnx" / MODEL_FILE, library, writer.path, options, self.progress)
            plugins = record["layers"]["PLUGIN_V3"]
            return {"summary": f"{plugins} plugin layers, {record['edition']} {record['version']}", "plugin_layers": plugins}

        inputs = [asdict(options), sha256_file(library), str(select_edition(request.engine)), _code_digest("exporter/e*.py")]
        self.stage("engine", inputs, work, needed_bytes=2 * size)

    def _report(self) -> None:
        from exporter.report import report_data, write_report
        from exporter.validate import ValidateOptions, validate

        def work(writer: StageWriter) -> dict[str, Any]:
            options = ValidateOptions(calib=self.request.calib, offline=self.request.offline)
            result = validate(self.request.out, options, self.progress)
            write_report(writer.path, report_data(self.request.out, self.manifest, result))
            return {"ok": result.ok, "first_failure": result.first_failure}

        self.stage("report", _code_digest("exporter/validate*.py", "exporter/report*.py", "exporter/sessions.py"), work)
        facts = self.manifest["stages"]["report"]["facts"]
        if not facts["ok"]:
            raise CheckError(f"validation of {self.request.out}", facts["first_failure"],
                             f"See {self.request.out / 'report' / 'index.html'}")


def run_pipeline(request: ExportRequest, progress: Progress) -> dict[str, Any]:
    """Run a request with OUT locked; returns the manifest. Raises as Pipeline.run does."""
    check_out(request)  # refuse a stranger's folder before writing a lock into it
    with _locked(request.out):
        return Pipeline(request, progress).run()
