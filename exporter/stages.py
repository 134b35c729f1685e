"""The four stages from a model to a proven engine. Each says which code and inputs decide its result,
how much it writes, and how; exporter/pipeline.py runs them.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.out.files import discard, sha256_file, write_json
from calibration.out.fingerprint import (
    CALIBRATION_CODE,
    digest,
    method_digest,
    package_versions,
    text_digest,
)
from calibration.out.folder import open_stage
from calibration.out.layout import (
    CHAT_FILE,
    ENGINE,
    HTML_FILE,
    MODEL_FILE,
    ONNX,
    PROOF_WORK,
    QUANT,
    REPORT,
    WORK,
)
from calibration.out.pieces import Pieces
from calibration.progress import Progress
from calibration.quant.scheme import FLOAT_BITS
from calibration.settings import CalibrationSettings
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.out.description import Description
    from calibration.quant.bits import SchemeMap
    from exporter.engine.edition import Edition
    from exporter.proof.perplexity import EvalRequest

__all__ = [
    "EngineStage",
    "ExportRequest",
    "OnnxStage",
    "QuantStage",
    "ReportStage",
    "Stage",
    "within_context",
]

_MAX_SEQ = 2048
_RUNTIMES = ("torch", "transformers", "onnxruntime", "polygraphy")  # the report's numbers differ


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Everything the command line asks for.

    Attributes:
        model: alias, hub id, Hugging Face folder or .gguf file.
        schemes: the quantization settings of every node; with a budget its base.
        out: the artifact folder.
        settings: of the calibration; its text serves the validation too.
        engine: "auto", "tensorrt", "tensorrt-rtx" or "none".
        max_batch: largest batch of the engine's profiles.
        max_seq: most tokens of a sequence, in the ONNX file and the engine; 0 is 2048, or the
            model's context if that is less.
        static_cache: the KV cache has room for so many tokens from the beginning; else it grows.
        until: the last stage to run, one of STAGES.
        resume: keep what is finished, stages and parts of them, if its inputs did not change.
        offline: never use the network.
        eval_text: a text whose perplexity the report shows.
        eval_windows: at most how many windows of it are scored, from the beginning.
        command: the command line, for the manifest and the report.
        format: one of calibration.formats, in which the quant folder is written too.
        budget: average weight bits within which each node's are picked by its sensitivity; None
            leaves the schemes.
        requantize: a checkpoint that is quantized already is taken as the floats that its codes
            stand for.
    """

    model: str
    schemes: SchemeMap
    out: Path
    settings: CalibrationSettings = CalibrationSettings()  # noqa: RUF009  (frozen)
    engine: str = "auto"
    max_batch: int = 1
    max_seq: int = 0
    static_cache: bool = False
    until: str = REPORT
    resume: bool = False
    offline: bool = False
    eval_text: Path | None = None
    eval_windows: int = 5
    command: tuple[str, ...] = ()
    format: str = "anybit"
    budget: float | None = None
    requantize: bool = False

    def identity(self) -> dict[str, Any]:
        """What makes an OUT folder belong to this request, as it was asked for: another model or
        setting needs another folder.
        """
        return {"model": self.model, **self.quantization()}

    def quantization(self) -> dict[str, Any]:
        """The settings in it."""
        return {
            "scheme": self.schemes.as_dict(),
            "budget": self.budget,
            **self.settings.as_dict(),
        }


def within_context(request: ExportRequest, context: int, progress: Progress) -> ExportRequest:
    """The request with a max_seq that the model has positions for; says where it cuts one that was
    asked for.

    Raises:
        InputError: a static cache is larger, which programs that run the file would not expect.
    """
    if request.static_cache and request.max_seq > context:
        raise InputError(
            "--kv",
            f"got a capacity of {request.max_seq} tokens, expected at most {context}, the context "
            f"that the model was made for",
            f"Give --kv static:{context} or less",
        )
    if request.max_seq > context:
        progress.warning(
            f"--max-seq: cut from {request.max_seq} to {context} tokens, the context that the model "
            f"was made for."
        )
    longest = min(request.max_seq or _MAX_SEQ, context)
    return replace(
        request, max_seq=longest, settings=replace(request.settings, max_context=longest)
    )


class Stage(ABC):
    """One step of the way: it reads the folders before its own and writes its own.

    Attributes:
        name: of its folder, one of STAGES.
        code: folders and files of the project, as patterns, that decide the result.
        fingerprint: of all that the result depends on; there when it works.
    """

    name: ClassVar[str]
    code: ClassVar[tuple[str, ...]]
    fingerprint: str

    def __init__(
        self, request: ExportRequest, manifest: dict[str, Any], progress: Progress
    ) -> None:
        self.request, self.manifest, self.progress = request, manifest, progress
        self.out = request.out

    def skipped(self) -> str:
        """Why the stage is left out; "" where it runs."""
        return ""

    @abstractmethod
    def inputs(self) -> Any:
        """What the result depends on besides the code and the stage before, as JSON can hold it."""

    @abstractmethod
    def needed_bytes(self) -> int:
        """Upper estimate of what it writes."""

    @abstractmethod
    def work(self, folder: Path) -> dict[str, Any]:
        """Write the stage's files into `folder`; returns facts for the manifest, "summary" among
        them.
        """

    def description(self) -> Description | None:
        """Of a folder that can be run alone; asked for after work()."""
        return None

    def finish(self) -> None:  # noqa: B027  (nothing, for most)
        """What is to be done with the result, new or kept."""

    def size_of(self, stage: str) -> int:
        """Bytes of a finished stage."""
        files = self.manifest["stages"][stage]["files"]
        return sum(file["bytes"] for file in files.values())


class QuantStage(Stage):
    """model -> quant: the integer codes."""

    name = QUANT
    code = CALIBRATION_CODE

    def __init__(self, *common: Any, checkpoint: Checkpoint, schemes: SchemeMap) -> None:
        super().__init__(*common)
        self.checkpoint, self.schemes = checkpoint, schemes

    def inputs(self) -> Any:
        """The model's files, the settings, the text and transformers."""
        return [
            self.checkpoint.stamp(),
            self.request.budget,
            self.request.settings.stamp(self.checkpoint),
            self.schemes.as_dict(),
            text_digest(self.request.settings.calib),
            self.request.format,
            method_digest(self.request.settings.method_file),
            package_versions(("transformers",)),  # makes the RoPE tables
        ]

    def needed_bytes(self) -> int:
        """Of all tensors."""
        from calibration.quant.quantize import kept_bytes, quant_bytes

        asked = quant_bytes(self.checkpoint, self.schemes, self.request.format)
        return asked - kept_bytes(self.out)

    def work(self, folder: Path) -> dict[str, Any]:
        """Calibrate and quantize."""
        from calibration.quant.quantize import QuantizeOptions, quantize_model

        options = QuantizeOptions(
            offline=self.request.offline,
            settings=self.request.settings,
            work=self.out / WORK,
            resume=self.request.resume,
            format=self.request.format,
        )
        return quantize_model(self.checkpoint, self.schemes, options, folder, self.progress)

    def finish(self) -> None:
        """Away with what was kept to go on from."""
        discard(self.out / WORK)


class OnnxStage(Stage):
    """quant -> onnx: the graph with packed weights, and positions for as many tokens as are asked
    for.
    """

    name = ONNX
    code = ("exporter/graph", "exporter/chat.py", "plugins")

    def inputs(self) -> Any:
        """How many positions there are, and the cache's form."""
        return [self.request.max_seq, self.request.static_cache]

    def needed_bytes(self) -> int:
        """About what the codes take."""
        return self.size_of(QUANT)

    def work(self, folder: Path) -> dict[str, Any]:
        """Write the graph."""
        from calibration.quant.describe import describe
        from calibration.quant.folder import read_quant
        from exporter.chat import chat_data, no_template
        from exporter.graph.decoder import export_onnx

        quant = read_quant(self.out / QUANT, verify=False)  # made, or found whole, a moment ago
        longest, static = self.request.max_seq, self.request.static_cache
        facts = export_onnx(quant, folder, self.progress, max_context=longest, static=static)
        made = describe(quant)
        self._description = made.static(longest) if static else replace(made, max_context=longest)
        copy_files(quant.path, self._description.tokenizer, folder)
        has_chat = self._description.chat_template is not None  # else nobody asks for transformers
        chat = chat_data(quant.tokenizer()) if has_chat else no_template()
        write_json(folder / CHAT_FILE, chat)
        if has_chat and (why := chat["why_not"]):
            self.progress.message(f"{ONNX}: no chat outside Python, {why}")
        token = self._description.cache.token_bytes
        return facts | {"summary": f"{facts['summary']}, {token} bytes of KV cache a token"}

    def description(self) -> Description:
        """Of the model, within the positions of the file."""
        return self._description


class EngineStage(Stage):
    """onnx -> engine: what TensorRT makes of it, with the plugin library."""

    name = ENGINE
    code = ("exporter/engine",)

    def __init__(
        self,
        *common: Any,
        edition: Edition | None,
        library: Path | None = None,
        missing: str = "",
    ) -> None:
        super().__init__(*common)
        self.edition, self.library, self.missing = edition, library, missing

    def skipped(self) -> str:
        """Without an edition."""
        if self.edition is not None:
            return self._refused()
        if self.request.engine == "none":
            return "skipped, because of --engine none"
        return (
            f"skipped: {self.missing}. pip install 'anybit-trt[rtx]' brings a TensorRT that needs "
            "no GPU to build, and its compiler; g++ is needed too. Then run the same command with "
            "--resume"
        )

    def _refused(self) -> str:
        """What no TensorRT takes, where the user did not ask for one."""
        cache = open_stage(self.out, ONNX, "the engine").description().cache
        if cache.capacity is None or cache.bits == FLOAT_BITS:
            return ""
        why = f"TensorRT takes no static cache of {cache.bits} bits"
        if self.request.engine == "auto":
            return f"skipped: {why}"
        raise InputError(
            "--kv",
            f"got a static cache of {cache.bits} bits, expected numbers of --dtype: {why}",
            "Leave out --kv or --kv-bits, or give --engine none",
        )

    def _options(self) -> Any:
        from exporter.engine.build import EngineOptions

        assert self.edition is not None
        return EngineOptions(
            edition=self.edition.name,
            max_batch=self.request.max_batch,
            max_seq=self.request.max_seq,
        )

    def inputs(self) -> Any:
        """The edition, its options, the plugin library, and the GPU where engines depend on it."""
        from exporter.engine.edition import gpu_capabilities

        assert self.edition is not None and self.library is not None
        gpus = gpu_capabilities() if self.edition.name == "tensorrt" else []
        return [asdict(self._options()), str(self.edition), gpus, sha256_file(self.library)]

    def needed_bytes(self) -> int:
        """The engine, and room for what it is built from."""
        return 2 * self.size_of(ONNX)

    def work(self, folder: Path) -> dict[str, Any]:
        """Build, and count the plugins."""
        from exporter.engine.build import build_engine
        from exporter.engine.limits import engine_limits
        from exporter.engine.record import read_engine_record

        assert self.library is not None
        source = self.out / ONNX
        build_engine(source / MODEL_FILE, self.library, folder, self._options(), self.progress)
        record = read_engine_record(folder)
        description = open_stage(self.out, ONNX, "the engine").description()
        copy_files(source, (*description.tokenizer, CHAT_FILE), folder)
        self._description = description.within(**asdict(engine_limits(record)))
        plugins = record["layers"]["PLUGIN_V3"]
        return {
            "summary": f"{plugins} plugin layers, {record['edition']} {record['version']}",
            "plugin_layers": plugins,
        }

    def description(self) -> Description:
        """Of the model, within the engine's profiles."""
        return self._description


class ReportStage(Stage):
    """Everything -> report: the proof, level by level."""

    name = REPORT
    code = ("exporter",)

    def __init__(self, *common: Any, scored: EvalRequest | None) -> None:
        super().__init__(*common)
        self.scored = scored

    def inputs(self) -> Any:
        """The texts, the runtimes and the GPUs."""
        from exporter.engine.edition import gpu_capabilities

        scored = [sha256_file(self.scored.text), self.scored.first] if self.scored else []
        return [
            scored,
            text_digest(self.request.settings.calib),
            package_versions(_RUNTIMES),
            gpu_capabilities(),
        ]

    def needed_bytes(self) -> int:
        """Next to nothing; what it keeps to go on from is left out where the disk is full."""
        return 0

    def work(self, folder: Path) -> dict[str, Any]:
        """Validate, score, and write the page."""
        from exporter.proof.options import ValidateOptions
        from exporter.proof.prove import prove
        from exporter.proof.saved import SavedResults
        from exporter.report.report import write_report

        options = ValidateOptions(
            calib=self.request.settings.calib,
            offline=self.request.offline,
            model=self.request.model,
        )
        saved = SavedResults(self._pieces(), self.progress)
        result, data = prove(self.out, self.manifest, options, self.scored, self.progress, saved)
        write_report(folder, data)
        summary = "every layer within tolerance" if result.ok else "a check failed"
        if perplexity := data["perplexity"]:
            summary += f", perplexity {perplexity['ppl']:.2f}"
        return {"first_failure": result.first_failure, "summary": summary}

    def _pieces(self) -> Pieces:
        """Of this proof, with the native kernels that are here."""
        from exporter.run.native import native_library

        library = native_library(self.progress.message)
        kernels = sha256_file(library) if isinstance(library, Path) else ""
        stamp = digest(self.fingerprint, kernels)
        return Pieces(self.out / PROOF_WORK, stamp, keep=self.request.resume)

    def finish(self) -> None:
        """Away with what was kept to go on from. A failed check is an error, of a report that was kept
        too.

        Raises:
            CheckError: a layer is out of tolerance.
        """
        discard(self.out / PROOF_WORK)
        failure = self.manifest["stages"][REPORT].get("facts", {}).get("first_failure")
        if failure:
            raise CheckError(
                f"validation of {self.out}",
                str(failure),
                f"See {self.out / REPORT / HTML_FILE}",
            )


def copy_files(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copy files of one folder into another."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)  # chat templates may lie deeper
        shutil.copyfile(source / name, folder / name)
