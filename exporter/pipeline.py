"""The stages from a model to a proven engine: their folders, their fingerprints, the manifest, and
resume.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.files import (
    StageWriter,
    file_records,
    locked,
    sha256_file,
    verify_files,
    write_json,
)
from calibration.out.fingerprint import (
    CALIBRATION_CODE,
    code_digest,
    digest,
    file_stamps,
    method_digest,
    package_versions,
    text_digest,
)
from calibration.out.manifest import (
    MANIFEST,
    STAGES,
    installed_versions,
    open_manifest,
    peak_rss,
    reset_peak_rss,
)
from calibration.progress import Progress
from calibration.settings import CalibrationSettings
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.budget.choice import Budget
    from calibration.quant.bits import SchemeMap
    from exporter.engine.edition import Edition
    from exporter.proof.perplexity import EvalRequest
    from exporter.proof.validate import ValidationResult

__all__ = ["STAGES", "ExportRequest", "run_pipeline"]

_RUNTIMES = (
    "torch",
    "transformers",
    "onnxruntime",
    "polygraphy",
)  # what the report's numbers depend on


@dataclass(frozen=True)
class ExportRequest:
    """Everything the command line asks for.

    Attributes:
        model: alias, hub id, Hugging Face folder or .gguf file.
        schemes: the quantisation settings of every node; with a budget its base.
        out: the artefact folder.
        settings: of the calibration; its text serves the validation too.
        engine: "auto", "tensorrt", "tensorrt-rtx" or "none".
        max_batch, max_seq: largest batch and context of the engine's profiles.
        until: the last stage to run, one of STAGES.
        resume: keep finished stages whose inputs did not change.
        offline: never use the network.
        eval_text: a text whose perplexity the report shows.
        eval_windows: at most how many windows of it are scored, from the beginning.
        command: the command line, for the manifest and the report.
        format: one of calibration.formats, in which the quant folder is written too.
        budget: average weight bits within which each node's are picked by its sensitivity; None
            leaves the schemes.
    """

    model: str
    schemes: SchemeMap
    out: Path
    settings: CalibrationSettings = CalibrationSettings()  # noqa: RUF009  (frozen)
    engine: str = "auto"
    max_batch: int = 1
    max_seq: int = 2048
    until: str = "report"
    resume: bool = False
    offline: bool = False
    eval_text: Path | None = None
    eval_windows: int = 5
    command: tuple[str, ...] = ()
    format: str = "anybit"
    budget: float | None = None

    def identity(self) -> dict[str, Any]:
        """What makes an OUT folder belong to this request: another model or setting needs another
        folder.
        """
        return {
            "model": self.model,
            "scheme": self.schemes.as_dict(),
            "budget": self.budget,
            **self.settings.as_dict(),
        }


class Pipeline:
    """Runs the stages of one request and keeps OUT/manifest.json true after each.

    Making one checks all that can be checked before any work, and writes nothing.

    Raises:
        InputError: bad input.
    """

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        from calibration.budget.choice import CACHE, Budget, bits_within
        from calibration.checkpoints.checkpoint import open_checkpoint
        from calibration.quant.checks import check_scheme

        self.request = request
        self.progress = progress
        self.fingerprint = ""
        self.eval: EvalRequest | None = None
        self.wanted = STAGES[: STAGES.index(request.until) + 1]
        self.manifest = open_manifest(request.out, request.identity())
        text = request.eval_text
        if text is not None and not text.is_file():
            raise InputError(
                "--eval", f"got no such file {text}, expected a UTF-8 text file", "Check the path"
            )
        self.edition = self._edition()
        self.checkpoint = open_checkpoint(request.model, request.offline)
        check_scheme(self.checkpoint, request.schemes, request.format)
        self.schemes = request.schemes
        self.budget = (
            None
            if request.budget is None
            else Budget(
                request.budget,
                request.schemes.base,
                request.settings,
                request.format,
                request.offline,
                request.out / CACHE,
                request.resume,
            )
        )
        if self.budget is not None:
            bits_within(self.checkpoint, self.budget)
        self._check_memory()

    def _edition(self) -> Edition | None:
        if "engine" not in self.wanted or self.request.engine == "none":
            return None
        from exporter.engine.build import select_edition

        return select_edition(self.request.engine)

    def _check_memory(self) -> None:
        from exporter.proof.memory import check_memory

        if self.request.until == "report":
            check_memory(
                self.checkpoint.parameter_count,
                self.schemes.weights(self.checkpoint.decoder),
            )

    def run(self) -> dict[str, Any]:
        """Run every stage up to request.until; returns the manifest.

        Raises:
            InputError: bad input. CheckError: plugin layers are missing, or a layer is out of
                tolerance.
        """
        steps = {
            "quant": self._quant,
            "onnx": self._onnx,
            "engine": self._engine,
            "report": self._report,
        }
        with locked(self.request.out):
            self.manifest = open_manifest(
                self.request.out, self.request.identity()
            )  # now that nobody else writes it
            if not self.manifest["stages"]:
                self._save()
            if self.budget is not None:
                self._spend(self.budget)
            for name in self.wanted:
                steps[name]()
        return self.manifest

    def _spend(self, budget: Budget) -> None:
        from calibration.budget.choice import schemes_within

        self.schemes = schemes_within(self.checkpoint, budget, self.progress)
        self._check_memory()  # nodes of more bits take more

    def _save(self) -> None:
        self.manifest |= {"versions": installed_versions(), "command": list(self.request.command)}
        write_json(self.request.out / MANIFEST, self.manifest)

    def stage(
        self,
        name: str,
        inputs: Any,
        work: Callable[[StageWriter], dict[str, Any] | None],
        needed_bytes: int = 0,
    ) -> None:
        """Run one stage, or keep its finished result when resuming.

        Args:
            name: one of STAGES.
            inputs: whatever the result depends on besides the stage before.
            work: writes the stage's files into the writer's path; what it returns goes into the
                manifest.
            needed_bytes: estimate of what it writes.
        """
        self.fingerprint = digest(self.fingerprint, name, inputs)
        record = self.manifest["stages"].get(name)
        if (
            self.request.resume
            and record
            and record["fingerprint"] == self.fingerprint
            and self._whole(name, record)
        ):
            self.progress.message(f"{name}: kept, nothing changed")
            return
        reset_peak_rss()
        began = time.monotonic()
        with StageWriter(self.request.out, name, needed_bytes) as writer:
            facts = work(writer) or {}
            files = file_records(writer.path)
            writer.sync()
            self._forget_after(name)
        record = {
            "fingerprint": self.fingerprint,
            "seconds": round(time.monotonic() - began, 2),
            "peak_rss": peak_rss(),
            "files": files,
        }
        self.manifest["stages"][name] = record | ({"facts": facts} if facts else {})
        self._save()

    def _forget_after(self, name: str) -> None:
        """Later stages were made from an earlier result of this one: away with their records, then
        with their folders.
        """
        later = STAGES[STAGES.index(name) + 1 :]
        self.manifest["stages"] = {
            key: record for key, record in self.manifest["stages"].items() if key not in later
        }
        self._save()
        for stage in later:
            shutil.rmtree(self.request.out / stage, ignore_errors=True)

    def _whole(self, name: str, record: dict[str, Any]) -> bool:
        try:
            verify_files(self.request.out / name, record["files"])
        except InputError as error:
            self.progress.message(f"{name}: made again, {error.where}: {error.problem}")
            return False
        return True

    def _bytes(self, name: str) -> int:
        return sum(file["bytes"] for file in self.manifest["stages"][name]["files"].values())

    def _quant(self) -> None:
        from calibration.quant.quantize import WORK, QuantizeOptions, quant_bytes, quantize_model

        request, schemes, checkpoint = self.request, self.schemes, self.checkpoint
        del self.checkpoint  # its mapped pages must not count in later stages' memory
        options = QuantizeOptions(
            request.offline,
            request.settings,
            request.out / WORK,
            request.resume,
            format=request.format,
        )
        inputs = [
            checkpoint.fingerprint,
            file_stamps(checkpoint.input_files()),
            request.identity(),
            schemes.as_dict(),
            text_digest(request.settings.calib),
            request.format,
            code_digest(*CALIBRATION_CODE),
            method_digest(request.settings.method_file),
        ]
        self.stage(
            "quant",
            inputs,
            lambda writer: quantize_model(checkpoint, schemes, options, writer.path, self.progress),
            needed_bytes=quant_bytes(checkpoint, schemes, request.format),
        )
        if request.eval_text is not None and "report" in self.wanted:
            self.eval = self._eval_request(request.eval_text)

    def _eval_request(self, text: Path) -> EvalRequest:
        """Cut the text now, with the tokenizer at hand, to refuse a short one before the longer
        stages.
        """
        from calibration.quant.folder import read_quant
        from exporter.proof.perplexity import EvalRequest, whole_windows

        request = EvalRequest(text, option="--eval")
        windows = whole_windows(read_quant(self.request.out / "quant", verify=False), request)
        return replace(request, first=min(self.request.eval_windows, len(windows)))

    def _onnx(self) -> None:
        from calibration.quant.folder import read_quant
        from exporter.graph.decoder import export_onnx

        folder = self.request.out / "quant"
        inputs = code_digest(
            "exporter/graph/decoder.py",
            "exporter/graph/nodes.py",
            "exporter/graph/weights.py",
            "plugins/**/*.py",
        )
        self.stage(
            "onnx",
            inputs,
            lambda writer: export_onnx(read_quant(folder), writer.path, self.progress),
            needed_bytes=self._bytes("quant"),
        )

    def _engine(self) -> None:
        if self.edition is None:
            self.progress.message("engine: skipped, because of --engine none")
            return
        from exporter.engine.build import EngineOptions, build_engine
        from exporter.engine.edition import gpu_capabilities
        from exporter.graph.decoder import MODEL_FILE
        from plugins.tools.build import build_library

        request = self.request
        options = EngineOptions(
            edition=self.edition.name, max_batch=request.max_batch, max_seq=request.max_seq
        )
        library = build_library()

        def work(writer: StageWriter) -> dict[str, Any]:
            record = build_engine(
                request.out / "onnx" / MODEL_FILE, library, writer.path, options, self.progress
            )
            plugins = record["layers"]["PLUGIN_V3"]
            return {
                "summary": f"{plugins} plugin layers, {record['edition']} {record['version']}",
                "plugin_layers": plugins,
            }

        gpus = (
            gpu_capabilities() if self.edition.name == "tensorrt" else []
        )  # the other edition's engines do not depend on them
        inputs = [
            asdict(options),
            str(self.edition),
            gpus,
            sha256_file(library),
            code_digest("exporter/engine/build.py", "exporter/engine/edition.py"),
        ]
        self.stage("engine", inputs, work, needed_bytes=2 * self._bytes("onnx"))

    def _report(self) -> None:
        from exporter.engine.edition import gpu_capabilities
        from exporter.proof.validate import ValidateOptions, validate
        from exporter.report.report import report_data, write_report

        request = self.request

        def work(writer: StageWriter) -> dict[str, Any]:
            options = ValidateOptions(
                calib=request.settings.calib, offline=request.offline, model=request.model
            )
            result, perplexity = self._perplexity(validate(request.out, options, self.progress))
            write_report(
                writer.path,
                report_data(request.out, self.manifest | {"perplexity": perplexity}, result),
            )
            summary = "every layer within tolerance" if result.ok else "a check failed"
            if perplexity:
                summary += f", perplexity {perplexity['ppl']:.2f}"
            return {"first_failure": result.first_failure, "summary": summary}

        scored = [sha256_file(self.eval.text), self.eval.first] if self.eval else []
        self.stage(
            "report",
            [
                scored,
                text_digest(request.settings.calib),
                code_digest("exporter/**/*.py"),
                package_versions(_RUNTIMES),
                gpu_capabilities(),
            ],
            work,
        )
        failure = self.manifest["stages"]["report"].get("facts", {}).get("first_failure")
        if failure:
            raise CheckError(
                f"validation of {request.out}",
                str(failure),
                f"See {request.out / 'report' / 'index.html'}",
            )

    def _perplexity(
        self, result: ValidationResult
    ) -> tuple[ValidationResult, dict[str, Any] | None]:
        """Of the ONNX model in ONNX Runtime, if it was asked for; a model that fails at it is the
        result's first failure.
        """
        from calibration.quant.folder import read_quant
        from exporter.proof.perplexity import score
        from exporter.run.sessions import open_session

        if self.eval is None:
            return result, None
        if not result.ok:
            return replace(
                result,
                notes=(
                    *result.notes,
                    "The perplexity was not scored, because a layer is out of tolerance.",
                ),
            ), None
        try:
            with open_session(self.eval.runner, self.request.out) as session:
                return result, score(
                    session,
                    read_quant(self.request.out / "quant", verify=False),
                    self.eval,
                    self.progress,
                )
        except CheckError as error:
            return replace(
                result,
                first_failure=f"perplexity of {self.eval.text.name}, {error.where}: "
                f"{error.problem}",
            ), None


def run_pipeline(request: ExportRequest, progress: Progress) -> dict[str, Any]:
    """Run a request with OUT locked; returns the manifest. Raises as Pipeline.run does."""
    try:
        return Pipeline(request, progress).run()
    finally:
        progress.close()
