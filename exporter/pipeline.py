"""Runs the stages from a model to a proven engine one after the other: their fingerprints, the
manifest, and resume.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoints.tokenizer import check_named
from calibration.out.description import write_description
from calibration.out.files import (
    StageWriter,
    discard,
    file_records,
    locked,
    verify_files,
    write_json,
)
from calibration.out.fingerprint import code_digest, digest, text_digest
from calibration.out.layout import (
    DESCRIPTION,
    ENGINE,
    MANIFEST,
    PROOF_WORK,
    REPORT,
    SENSITIVITY,
    STAGES,
)
from calibration.out.manifest import installed_versions, open_manifest, peak_rss, reset_peak_rss
from calibration.progress import Progress
from exporter.stages import (
    EngineStage,
    ExportRequest,
    OnnxStage,
    QuantStage,
    ReportStage,
    Stage,
    within_context,
)
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.budget.choice import Budget
    from exporter.engine.edition import Edition
    from exporter.proof.perplexity import EvalRequest

__all__ = ["ExportRequest", "run_pipeline"]


class Pipeline:
    """Runs the stages of one request and keeps OUT/manifest.json true after each.

    Making one checks all that can be checked before any work, and writes nothing.

    Raises:
        InputError: bad input.
    """

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        from calibration.budget.choice import bits_within
        from calibration.checkpoints.checkpoint import open_checkpoint
        from calibration.checkpoints.sources import check_name
        from calibration.quant.checks import check_scheme
        from calibration.quant.keep import check_quantized
        from exporter.proof.perplexity import read_text, text_windows, window_length

        self.request = request
        self.progress = progress
        self.fingerprint = ""
        self.wanted = STAGES[: STAGES.index(request.until) + 1]
        check_name(request.model)  # a mistyped name is not a wrong --out
        self.content = {"calib": text_digest(request.settings.calib)}
        self.manifest = self._open_manifest()  # before a long download
        text = request.eval_text
        if text is not None:
            read_text(text, "--eval")
        self.missing = ""  # why "auto" builds no engine
        self.edition = self._edition()
        self.checkpoint = open_checkpoint(request.model, request.offline)
        self.content["model"] = self.checkpoint.fingerprint
        self.manifest = self._open_manifest()
        context = int(self.checkpoint.config.max_position_embeddings)
        self.request = within_context(request, context, progress)
        if text is not None and REPORT in self.wanted:
            seqlen, vocab = window_length(self.request.max_seq), self.checkpoint.decoder.vocab
            text_windows(self.checkpoint.tokenizer(), text, seqlen, vocab, "--eval")
        kept = request.schemes.base.kept
        if note := check_quantized(self.checkpoint, kept, request.requantize):
            progress.message(note)
        check_scheme(self.checkpoint, request.schemes, request.format)
        self.schemes = request.schemes
        self.budget = self._budget()
        if self.budget is not None:
            bits_within(self.checkpoint, self.budget)
        self._check_room()
        self._check_memory()

    def _open_manifest(self) -> dict[str, Any]:
        return open_manifest(self.request.out, self.request.identity(), self.content)

    def _edition(self) -> Edition | None:
        """Which TensorRT builds; None where none is wanted, or "auto" finds none."""
        if ENGINE not in self.wanted or self.request.engine == "none":
            return None
        from exporter.engine.build import select_edition
        from exporter.engine.edition import edition_warning
        from plugins.tools.toolkit import find_compilers

        try:
            edition = select_edition(self.request.engine)
            find_compilers()  # of the plugin library, without which there is no engine
        except InputError as error:
            if self.request.engine != "auto":
                raise
            self.missing = f"{error.where}: {error.problem}"
            return None
        if warning := edition_warning(edition):
            self.progress.warning(f"{ENGINE}: {warning}")
        return edition

    def _budget(self) -> Budget | None:
        from calibration.budget.choice import Budget

        request = self.request
        if request.budget is None:
            return None
        return Budget(
            bits=request.budget,
            base=request.schemes.base,
            settings=request.settings,
            format=request.format,
            offline=request.offline,
            cache=request.out / SENSITIVITY,
            resume=request.resume,
            head_bits=request.schemes.head_bits,
            head_limit=request.schemes.head_limit,
        )

    def _check_room(self) -> None:
        """Say what the stages that are to be made will take, and refuse what does not fit."""
        from calibration.methods import find_method
        from exporter.estimate import check_room, estimate

        request, finished = self.request, self.manifest["stages"] if self.request.resume else {}
        base, file = self.schemes.base, request.settings.method_file
        calibrates = not base.kept and find_method(base.method, file).looks_at_data
        skipped = set() if self.edition is not None else {ENGINE}
        asked = estimate(
            self.checkpoint,
            self.schemes,
            request.settings,
            [stage for stage in self.wanted if stage not in skipped and stage not in finished],
            calibrates,
            request.format,
        )
        if asked.memory:
            self.progress.message(str(asked))
        check_room(request.out, asked)

    def _check_memory(self) -> None:
        from exporter.proof.memory import Calls, attention_windows, check_memory

        if self.request.until == REPORT:
            decoder = self.checkpoint.decoder.with_floats(self.schemes.floats)
            if self.schemes.head_limit is None:  # else the head may stay in floating point
                decoder = self.schemes.decoder(decoder)
            context = self.request.max_seq
            calls = Calls.within(context, attention_windows(decoder, context))
            check_memory(decoder, self.schemes.nodes(decoder), calls.tokens)

    def run(self) -> dict[str, Any]:
        """Run every stage up to request.until; returns the manifest.

        Raises:
            InputError: bad input. CheckError: plugin layers are missing, or a layer is out of
                tolerance.
        """
        self.library = self._compile()
        with locked(self.request.out, self.progress.message):
            self.manifest = self._open_manifest()  # now that nobody else writes it
            if not self.manifest["stages"]:
                self._save()
            if self.budget is not None:
                self._spend(self.budget)
            for stage in self._stages():
                if why := stage.skipped():
                    self.progress.message(f"{stage.name}: {why}")
                    continue
                self._make_or_keep(stage)
                stage.finish()
        return self.manifest

    def _compile(self) -> Path | None:
        """All that needs to be compiled: what fails for an engine fails before hours of work. The report
        has a level less where there are no native kernels.
        """
        from exporter.engine.edition import prepare_parser
        from exporter.run.native import native_library
        from plugins.tools.build import build_library

        if REPORT in self.wanted:
            native_library(self.progress.message)
        if self.edition is None:
            return None
        prepare_parser(self.edition)
        return build_library(say=lambda text: self.progress.message(f"{ENGINE}: {text}"))

    def _spend(self, budget: Budget) -> None:
        from calibration.budget.choice import schemes_within

        self.schemes = schemes_within(self.checkpoint, budget, self.progress)
        self._check_memory()  # nodes of more bits take more

    def _stages(self) -> Iterator[Stage]:
        """The wanted stages, each made when its turn comes."""
        common = (self.request, self.manifest, self.progress)
        checkpoint = self.checkpoint
        del self.checkpoint  # its mapped pages must not count in later stages' memory
        yield QuantStage(*common, checkpoint=checkpoint, schemes=self.schemes)
        del checkpoint
        scored = self._eval_request()
        stages = (
            OnnxStage(*common),
            EngineStage(*common, edition=self.edition, library=self.library, missing=self.missing),
            ReportStage(*common, scored=scored),
        )
        yield from (stage for stage in stages if stage.name in self.wanted)

    def _eval_request(self) -> EvalRequest | None:
        """Cut the text now, with the tokenizer at hand, to refuse a short one before the longer
        stages.
        """
        from exporter.proof.perplexity import EvalRequest, whole_windows, window_length
        from exporter.run.model import find_model

        text = self.request.eval_text
        if text is None or REPORT not in self.wanted:
            return None
        request = EvalRequest(text, option="--eval", seqlen=window_length(self.request.max_seq))
        windows = whole_windows(find_model(self.request.out, "torch"), request)
        return replace(request, first=min(self.request.eval_windows, len(windows)))

    def _make_or_keep(self, stage: Stage) -> None:
        """Run one stage, or keep its finished result when resuming."""
        self.fingerprint = digest(
            self.fingerprint, stage.name, code_digest(*stage.code), stage.inputs()
        )
        record = self.manifest["stages"].get(stage.name)
        if (
            self.request.resume
            and record
            and record["fingerprint"] == self.fingerprint
            and self._as_made(stage.name, record["files"])
        ):
            self.progress.message(f"{stage.name}: kept, nothing changed")
            return
        reset_peak_rss()
        began = time.monotonic()
        with StageWriter(self.request.out, stage.name, stage.needed_bytes()) as writer:
            stage.fingerprint = self.fingerprint
            facts = stage.work(writer.path)
            files = _describe(stage, writer.path)
            writer.sync()
            self._forget_after(stage.name)
        self.manifest["stages"][stage.name] = {
            "fingerprint": self.fingerprint,
            "seconds": round(time.monotonic() - began, 2),
            "peak_rss": peak_rss(),
            "files": files,
            "facts": facts,
        }
        self._save()

    def _as_made(self, name: str, records: dict[str, Any]) -> bool:
        """Whether a stage's files are whole, and none but they would be read from its folder."""
        folder = self.request.out / name
        try:
            verify_files(folder, records)
            if name != REPORT:  # in which nobody looks for a tokenizer
                check_named(folder, records, "Take it away")
        except InputError as error:
            self.progress.message(f"{name}: made again, {error.where}: {error.problem}")
            return False
        return True

    def _forget_after(self, name: str) -> None:
        """Later stages were made from an earlier result of this one: away with their records, then
        with their folders.
        """
        later = STAGES[STAGES.index(name) + 1 :]
        for stage in later:
            self.manifest["stages"].pop(stage, None)
        self._save()
        for folder in (*later, PROOF_WORK) if later else ():
            discard(self.request.out / folder)

    def _save(self) -> None:
        self.manifest |= {"versions": installed_versions(), "command": list(self.request.command)}
        write_json(self.request.out / MANIFEST, self.manifest)


def _describe(stage: Stage, folder: Path) -> dict[str, dict[str, Any]]:
    """Write what the folder has to say of itself; returns the records of all its files, each hashed
    once.
    """
    files = file_records(folder)
    if description := stage.description():
        write_description(folder, description, files)
        files |= file_records(folder, only=DESCRIPTION)
    return files


def run_pipeline(request: ExportRequest, progress: Progress) -> dict[str, Any]:
    """Run a request with OUT locked; returns the manifest. Raises as Pipeline.run does."""
    try:
        return Pipeline(request, progress).run()
    finally:
        progress.close()
