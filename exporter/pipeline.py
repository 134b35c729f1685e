"""The stages from a model to a proven engine: their folders, their fingerprints, the manifest, and resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.artifact import StageWriter, file_records, sha256_file, verify_files, write_json
from calibration.progress import Progress
from exporter.manifest import MANIFEST, installed_versions, locked, open_manifest, peak_rss, reset_peak_rss
from plugins.core.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.scheme import QuantScheme

__all__ = ["STAGES", "ExportRequest", "run_pipeline"]

STAGES = ("quant", "onnx", "engine", "report")


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
        eval_text: a text whose perplexity the report shows.
        eval_windows: how many windows of it are scored, from the beginning.
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
    eval_text: Path | None = None
    eval_windows: int = 5
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


class Pipeline:
    """Runs the stages of one request and keeps OUT/manifest.json true after each."""

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        self.request = request
        self.progress = progress
        self.manifest = open_manifest(request.out, request.identity())
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
        reset_peak_rss()
        began = time.monotonic()
        with StageWriter(self.request.out, name, needed_bytes) as writer:
            facts = work(writer) or {}
            files = file_records(writer.path)
        record = {"fingerprint": self.fingerprint, "seconds": round(time.monotonic() - began, 2), "peak_rss": peak_rss(), "files": files}
        stages = {key: value for key, value in self.manifest["stages"].items() if key in STAGES[: STAGES.index(name)]}
        self.manifest["stages"] = {**stages, name: record | ({"facts": facts} if facts else {})}
        self.manifest |= {"versions": installed_versions(), "command": list(self.request.command)}
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
        text = self.request.eval_text
        if text is not None and not text.is_file():
            raise InputError("--eval", f"got no such file {text}, expected a UTF-8 text file", "Check the path")
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

        request = self.request

        def work(writer: StageWriter) -> dict[str, Any]:
            result = validate(request.out, ValidateOptions(calib=request.calib, offline=request.offline), self.progress)
            perplexity = self._perplexity()
            write_report(writer.path, report_data(request.out, self.manifest | {"perplexity": perplexity}, result))
            summary = "every layer within tolerance" if result.ok else "out of tolerance"
            if perplexity:
                summary += f", perplexity {perplexity['ppl']:.2f}"
            return {"ok": result.ok, "first_failure": result.first_failure, "summary": summary}

        text = [sha256_file(request.eval_text), request.eval_windows] if request.eval_text else []
        self.stage("report", [text, _code_digest("exporter/[prsv]*.py")], work)
        facts = self.manifest["stages"]["report"]["facts"]
        if not facts["ok"]:
            raise CheckError(f"validation of {request.out}", facts["first_failure"], f"See {request.out / 'report' / 'index.html'}")

    def _perplexity(self) -> dict[str, Any] | None:
        """Of the ONNX model in ONNX Runtime, if it was asked for."""
        from calibration.quant_folder import read_quant
        from exporter.perplexity import EvalRequest, score
        from exporter.sessions import open_session

        if self.request.eval_text is None:
            return None
        request = EvalRequest(self.request.eval_text, first=self.request.eval_windows)
        with open_session(request.runner, self.request.out) as session:
            return score(session, read_quant(self.request.out / "quant", verify=False), request, self.progress)


def run_pipeline(request: ExportRequest, progress: Progress) -> dict[str, Any]:
    """Run a request with OUT locked; returns the manifest. Raises as Pipeline.run does."""
    open_manifest(request.out, request.identity())  # refuse a stranger's folder before writing a lock into it
    with locked(request.out):
        return Pipeline(request, progress).run()
