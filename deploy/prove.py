"""python -m deploy prove: the export's comparison, level by level, on a finished artifact."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import HTML_FILE, JSON_FILE, MANIFEST
from deploy.command import Command, add_progress
from deploy.target import check_target
from exporter.run import runners
from plugins.cli import whole_number
from plugins.errors import CheckError

if TYPE_CHECKING:
    from calibration.progress import Progress
    from exporter.proof.judge import LayerReport
    from exporter.proof.options import ValidateOptions
    from exporter.proof.result import ValidationResult

__all__ = ["COMMAND", "prove_artifact", "summary", "table"]


def prove_artifact(
    out: Path, options: ValidateOptions, to: Path | None, progress: Progress
) -> ValidationResult:
    """Check the files of OUT, prove it, and write the report where it is wanted; nothing in OUT
    changes.

    Args:
        out: the artifact folder, with quant/, onnx/ and perhaps engine/.
        options: of the validation; without a float model the one that the manifest names is taken,
            without a text the one it was calibrated with.
        to: the folder of the report, or None.

    Raises:
        InputError: a stage is missing or damaged, an option does not fit, or the report cannot be
            written. CheckError: as exporter.proof.validate.validate does.
    """
    from dataclasses import replace

    from calibration.out.files import StageWriter
    from calibration.out.folder import stages_in
    from calibration.out.manifest import read_manifest
    from exporter.proof.files import check_files
    from exporter.proof.prove import prove
    from exporter.report.report import write_report

    stages_in(out)  # says what is wrong with a folder that is none
    if to is not None:
        check_target(to, out, "proof", (HTML_FILE, JSON_FILE))
    check_files(out)
    manifest = read_manifest(out / MANIFEST)
    request: dict[str, Any] = manifest["request"]
    options = replace(
        options,
        model=options.model or request.get("model"),
        calib=options.calib or _recorded_text(request),
    )
    result, data = prove(out, manifest, options, None, progress)
    if to is not None:
        with StageWriter(to.parent, to.name) as writer:
            write_report(writer.path, data)
    return result


def _recorded_text(request: dict[str, Any]) -> str | None:
    """The text of the calibration; None for the project's own."""
    return None if (text := request.get("calib")) == "default" else text


def table(result: ValidationResult) -> str:
    """A line for each level and phase: what is nearest to, or furthest beyond, its limit."""
    lines = [("level", "phase", "worst of", "", "error", "limit")]
    for level, phase in dict.fromkeys((row.level, row.phase) for row in result.rows):
        rows = [row for row in result.rows if (row.level, row.phase) == (level, phase)]
        name, error, limit = max(map(_worst, rows), key=_share)
        bad = sum(not row.ok for row in rows)
        verdict = f"  {bad} out of tolerance" if bad else ""
        lines.append((level, phase, str(len(rows)), name, _number(error), _number(limit) + verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place == _COUNT else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_COUNT = 2  # the column of numbers of rows
_Worst = tuple[str, float | None, float | None]  # what, its error, its limit


def _worst(row: LayerReport) -> _Worst:
    """The operator or the tensor of a row, whichever is nearer to its limit."""
    if row.overflow:
        return row.overflow, None, None
    whole: _Worst = row.tensor, row.relative, row.limit
    if not row.operator:
        return whole
    inside = f"{row.tensor}, {row.operator}" if row.level == "weights" else row.operator
    return max(((inside, row.operator_error, row.operator_limit), whole), key=_share)


def _share(worst: _Worst) -> float:
    """An error in units of its limit; one without a limit is far below any that has one."""
    _, error, limit = worst
    if error is None:
        return math.inf
    if limit is None:
        return -1 / (1 + error)
    return error / limit if limit else math.inf if error else 0.0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _names(text: str) -> tuple[str, ...]:
    """An argparse type: names of runners, separated by commas."""
    known = tuple(runners())
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"got {unknown[0]!r}, expected some of {','.join(known)}, separated by commas"
        )
    return names


def _layers(text: str) -> tuple[int, int]:
    """An argparse type: decoder layers A:B, B left out."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected A:B, the first layer and the one behind the last"
        )
    return int(found[1]), int(found[2])


class Prove(Command):
    """Prints a table, and writes the report where it is told to."""

    name = "prove"
    help = "compare every layer again, as the export did"
    description = (
        "Compare a finished artifact with its references, level by level, and name the first node "
        "that is out of tolerance (exit code 3). OUT needs quant/ and onnx/, and stays as it is."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What is run, on which text, and where the report goes."""
        add = parser.add_argument
        add(
            "--runner",
            type=_names,
            metavar="NAME,...",
            help=f"of {', '.join(runners())}: those that are compared with onnxruntime, which "
            "always runs; each must be able to (default: all that can run here)",
        )
        add("--text", metavar="FILE", help="real text to run (default: the one of the calibration)")
        add(
            "--tokens",
            type=whole_number(1),
            metavar="N",
            help="of the prefill (default 64, or what crosses an attention window, up to 1024)",
        )
        add(
            "--layers",
            type=_layers,
            metavar="A:B",
            help="judge decoder layers A to B-1 only (default: all)",
        )
        add(
            "--against",
            type=Path,
            metavar="OUT2",
            help="another artifact of the same float model, compared too",
        )
        add(
            "--model",
            metavar="MODEL",
            help="the float model (default: the one that the artifact was made from)",
        )
        add("--to", type=Path, metavar="FOLDER", help="write the report's page and JSON here")
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Prove and print; a failed check is a CheckError."""
        from calibration.progress import make_progress
        from exporter.proof.options import ValidateOptions
        from plugins.text import printable

        options = ValidateOptions(
            calib=args.text,
            option="--text" if args.text else "--calib",
            model=args.model,
            tokens=args.tokens,
            runners=args.runner,
            layers=args.layers,
            against=args.against,
        )
        progress = make_progress(args.progress)
        try:
            result = prove_artifact(out, options, args.to, progress)
        finally:
            progress.close()
        print(printable(table(result), keep="\n"))
        for note in result.notes:
            print(f"Note: {printable(note)}")
        for warning in result.warnings:
            print(f"Warning: {printable(warning)}")
        for cause in result.facts.get("causes", ()):
            print(f"Not what quant/ gives: {printable(cause)}")
        if args.to is not None:
            print(f"Report: {printable(str(args.to / HTML_FILE))}")
        if not result.ok:
            page = (
                f"See {args.to / HTML_FILE}" if args.to else "--to FOLDER writes the whole report"
            )
            raise CheckError(f"proof of {out}", result.first_failure, page)
        print(summary(result.rows))


def summary(rows: Sequence[LayerReport]) -> str:
    """What was proven: rows that were held against a limit; what was only shown proves nothing."""
    judged = [row for row in rows if row.judged]
    levels = dict.fromkeys(row.level for row in judged)
    shown = [level for level in dict.fromkeys(row.level for row in rows) if level not in levels]
    parts = ["Nothing is proven: no error has a limit."]
    if judged:
        names = f"{len(levels)} level{'s' * (len(levels) > 1)} ({', '.join(levels)})"
        parts = [f"Proven: {len(judged)} tensors at {names} within tolerance."]
    if left := len(rows) - len(judged):
        named = f" ({', '.join(shown)})" if shown else ""
        parts.append(f"{left} shown, not judged{named}.")
    return " ".join(parts)


COMMAND = Prove()
