"""The whole proof of an artifact: validation, the perplexity of a text, how near the model is to its
float model, and what the report shows of it. The exporter's last stage and python -m deploy prove are this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import QUANT, REPORT
from calibration.progress import Progress
from exporter.proof.options import (
    REFERENCE,
    ValidateOptions,
    float_checkpoint,
    max_context,
    text_rows,
)
from exporter.proof.result import ValidationResult
from exporter.proof.saved import SavedResults
from exporter.proof.validate import NO_FLOATS, validate
from plugins.errors import CheckError

if TYPE_CHECKING:
    import numpy as np

    from calibration.quant.folder import QuantModel
    from exporter.proof.perplexity import EvalRequest

__all__ = ["prove"]

# Windows of the proof's text, and tokens of each, by which quality and the loss of the file as it is
# run are told. As many as cost about the same for every size of model, within bounds.
_LENGTH, _ROWS, _MOST_ROWS, _WORK = 64, 4, 16, 3_000_000_000


def prove(
    out: Path,
    manifest: Mapping[str, Any],
    options: ValidateOptions,
    scored: EvalRequest | None,
    progress: Progress,
    saved: SavedResults | None = None,
) -> tuple[ValidationResult, dict[str, Any]]:
    """Prove what is in OUT; writes nothing there but what is to be saved.

    Args:
        out: the artifact folder, with quant/ and onnx/.
        manifest: of its stages.
        options: of the validation.
        scored: the text whose perplexity is wanted.
        saved: keeps every level and window that is done.

    Returns:
        What was found, and what exporter.report.report.write_report shows.

    Raises:
        InputError: as validate does. CheckError: as validate does; a layer out of tolerance is a
            result.
    """
    from exporter.report.report import report_data

    saved = saved or SavedResults()
    result = validate(out, options, progress, saved)
    result = _loss(out, result, options, progress, saved)
    result, perplexity = _perplexity(out, result, scored, progress, saved)
    result, quality = _quality(out, result, options, scored, progress, saved)
    if quality is not None:
        quality["seen"] = scored is None and _calibrated_on(out, manifest, options)
    found = {"perplexity": perplexity, "quality": quality}
    return result, report_data(out, {**manifest, **found}, result)


def _calibrated_on(out: Path, manifest: Mapping[str, Any], options: ValidateOptions) -> bool:
    """Whether the proof's text is the one that calibration looked at, if it looked at any."""
    from calibration.quant.folder import read_quant

    text = manifest.get("request", {}).get("calib") or "default"
    return (
        "windows" in read_quant(out / QUANT, verify=False).calibration
        and (options.calib or "default") == text
    )


def _text_windows(out: Path, quant: QuantModel, options: ValidateOptions) -> np.ndarray:
    """Tokens [n, L] of the proof's text."""
    length = min(options.tokens or _LENGTH, max_context(out, quant))
    rows = min(max(_WORK // int(quant.sizes["linear_weights"]), _ROWS), _MOST_ROWS)
    return text_rows(quant, options, rows, max(length, 2))


def _loss(
    out: Path,
    result: ValidationResult,
    options: ValidateOptions,
    progress: Progress,
    saved: SavedResults,
) -> ValidationResult:
    """With the loss of the file as users run it against the rounded graph's, where that level was run
    on a whole model.
    """
    from calibration.quant.folder import read_quant
    from exporter.proof.judge import AS_RUN
    from exporter.proof.loss import LossDifference, loss_as_run

    if not result.ok or options.layers or not any(row.level == AS_RUN for row in result.rows):
        return result
    quant = read_quant(out / QUANT, verify=False)  # verified a moment ago
    windows = _text_windows(out, quant, options)
    progress.start(REPORT, 2 * len(windows))
    context = max_context(out, quant)
    try:
        work = partial(loss_as_run, out, quant.scheme.dtype, context, windows, progress)
        found = saved.once("loss", LossDifference, work, 2 * len(windows))
    except CheckError as error:
        return replace(result, first_failure=f"loss as run, {error.where}: {error.problem}")
    progress.finish()
    warnings = result.warnings
    if found.shows:
        warnings += (
            f"As users run it, the file's loss differs from the rounded graph's: {found}.",
        )
    facts = result.facts | {"loss_as_run": found.as_dict()}
    return replace(result, first_failure=found.failure, warnings=warnings, facts=facts)


def _perplexity(
    out: Path,
    result: ValidationResult,
    scored: EvalRequest | None,
    progress: Progress,
    saved: SavedResults,
) -> tuple[ValidationResult, dict[str, Any] | None]:
    """Of the ONNX model in ONNX Runtime, if it was asked for; a model that fails at it is the
    result's first failure.
    """
    from exporter.proof.perplexity import score
    from exporter.run.model import find_model

    if scored is None:
        return result, None
    if not result.ok:
        note = "The perplexity was not scored, because a layer is out of tolerance."
        return replace(result, notes=(*result.notes, note)), None
    model = find_model(out, scored.runner)
    try:
        with model.open() as session:
            return result, score(session, model, scored, progress, saved)
    except CheckError as error:
        failure = f"perplexity of {scored.text.name}, {error.where}: {error.problem}"
        return replace(result, first_failure=failure), None


def _quality(
    out: Path,
    result: ValidationResult,
    options: ValidateOptions,
    scored: EvalRequest | None,
    progress: Progress,
    saved: SavedResults,
) -> tuple[ValidationResult, dict[str, Any] | None]:
    """Against the float model, on the scored text or on the proof's; None of a part of the model,
    of one that is out of tolerance, and where there is no float model.
    """
    from calibration.quant.folder import read_quant
    from exporter.proof.quality import QualityReport, measure_quality, quality_steps

    if not result.ok or options.layers or not options.wants(REFERENCE):
        return result, None
    if any(note.startswith(NO_FLOATS) for note in result.notes):
        return result, None
    quant = read_quant(out / QUANT, verify=False)  # verified a moment ago
    checkpoint = float_checkpoint(quant, options)
    if isinstance(checkpoint, str):
        return result, None  # the result's notes say so
    windows, name = _windows(out, quant, options, scored)
    progress.start(REPORT, quality_steps(windows))
    try:
        longest = max_context(out, quant)
        work = partial(measure_quality, checkpoint, quant, windows, name, progress, longest)
        found = saved.once("quality", QualityReport, work, quality_steps(windows))
    except CheckError as error:
        return replace(result, first_failure=f"quality of {error.where}: {error.problem}"), None
    progress.finish()
    return result, {**found.as_dict(), "codes": checkpoint.format}


def _windows(
    out: Path, quant: QuantModel, options: ValidateOptions, scored: EvalRequest | None
) -> tuple[np.ndarray, str]:
    """Tokens [n, L], and what they are of."""
    from exporter.proof.perplexity import select_windows, whole_windows
    from exporter.run.model import find_model

    if scored is None:
        return _text_windows(out, quant, options), options.text_name
    windows = whole_windows(find_model(out, scored.runner), scored)
    return windows[select_windows(len(windows), scored.windows, scored.first)], scored.text.name
