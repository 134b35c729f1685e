"""python -m deploy attribute: what each node costs, and which bits would buy the most."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.layout import (
    ATTRIBUTION,
    BITS_FILE,
    HTML_FILE,
    JSON_FILE,
    MANIFEST,
    QUANT,
    REPORT,
)
from deploy.command import Command, add_held_out, add_progress
from plugins.cli import number, whole_number
from plugins.text import printable

if TYPE_CHECKING:
    from numpy import ndarray

    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress
    from deploy.compare import CompareRequest
    from exporter.proof.attribution import Attribution

__all__ = ["COMMAND", "attribute_artifact", "show_in_report", "text"]

_WINDOWS, _SEQLEN, _ADD_BITS = 8, 128, 0.25
_CALIBRATION = 32  # windows, at most
_SHOWN = 12  # nodes


def attribute_artifact(
    out: Path, request: CompareRequest, minutes: float, add_bits: float, progress: Progress
) -> Attribution:
    """Measure what each node of an artifact costs, with OUT locked. What is measured is kept in
    OUT/attribution.json; a report that is there shows the result.

    Args:
        out: the artifact folder.
        request: of this artifact alone, its text and float model.
        minutes: see AttributionJob; 0 is no bound.
        add_bits: see AttributionJob.
        progress: a stage for each walk through the layers.

    Raises:
        InputError: the artifact, the float model or the text cannot be read or do not fit, or OUT
            cannot be written. CheckError: a model computes NaN.
    """
    from calibration.out.files import locked
    from deploy.compare import open_compared, text_of
    from exporter.proof.attribution import AttributionJob, attribute

    opened = open_compared(request)
    with locked(out):
        job = AttributionJob(
            quant=opened.quants[0],
            checkpoint=opened.checkpoint,
            windows=opened.windows,
            text=text_of(request),
            calibration=_calibration(opened.checkpoint, opened.windows.shape[1]),
            max_context=opened.contexts[0],
            record=out / ATTRIBUTION,
            minutes=minutes,
            add_bits=add_bits,
        )
        found = attribute(job, progress)
        show_in_report(out, found)
    return found


def _calibration(checkpoint: Checkpoint, length: int) -> ndarray:
    """Windows [m, length] from the end of the project's own text; what is scored begins it."""
    import numpy as np

    from calibration.data import default_text, text_tokens, windows_from_tokens

    vocab = checkpoint.decoder.vocab
    tokens = text_tokens(checkpoint.tokenizer(), default_text(), vocab, "the default text")
    tokens = np.resize(tokens, max(len(tokens), length))
    return windows_from_tokens(tokens[len(tokens) % length :], length)[-_CALIBRATION:]


def show_in_report(out: Path, found: Attribution) -> bool:
    """Make the page of a report that is there again, with what was found in it.

    Returns:
        Whether there is a report.
    """
    from calibration.out.files import StageWriter, file_records, write_json
    from calibration.out.json_file import read_json
    from calibration.out.manifest import read_manifest
    from exporter.report.report import write_report

    folder = out / REPORT
    if not (folder / JSON_FILE).is_file() or not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out / MANIFEST)
    data = read_json(folder / JSON_FILE, "Make the report again") | {"attribution": found.as_dict()}
    with StageWriter(out, REPORT) as writer:
        write_report(writer.path, data)
        files = file_records(writer.path)
    if REPORT in manifest["stages"]:
        manifest["stages"][REPORT]["files"] = files
        write_json(out / MANIFEST, manifest)
    return True


def text(out: Path, found: Attribution) -> str:
    """Lines for people."""
    as_is = found.found
    lines = [
        f"KL {as_is.kl:.4f} nats per token, perplexity {as_is.ppl:.3f} (float {found.float_ppl:.3f}), "
        f"same next token {as_is.top1:.1%}",
        "",
        "in floating point, the rest as it is        gain     KL left",
    ]

    def line(name: str, gain: float) -> str:
        return f"{name:40} {gain:+8.4f}   {as_is.kl - gain:9.4f}"

    lines += [line(name, found.gain(means)) for name, means in found.parts.items()]
    if ranked := found.ranked():
        lines += ["", *(line(name, gain) for name, gain in ranked[:_SHOWN])]
    if len(ranked) > _SHOWN:
        lines.append(f"and {len(ranked) - _SHOWN} more nodes that were measured")
    if ranges := found.unopened():
        lines += ["", *(line(name, gain) for name, gain in ranges[:_SHOWN])]
    if found.nodes_left:
        why = "in layers that gain little" if found.finished else "for want of time"
        lines.append(f"{found.nodes_left} nodes were not measured by themselves, {why}")
    lines.append("")
    if found.plan is None:
        lines.append(
            "No lines: nothing that was measured and gains fits into --add-bits. Give more of them, or "
            "more --minutes, so that smaller parts are measured."
        )
        return "\n".join(lines)
    plan = found.plan
    there = out / QUANT / BITS_FILE
    more = f", behind those of {there}" if there.is_file() else ""
    return "\n".join(
        [
            *lines,
            f"Lines for --bits-file{more}, of {plan.bits_before:.2f} -> {plan.bits_after:.2f} bits per "
            "weight:",
            *plan.lines,
            f"KL {as_is.kl:.4f} -> {plan.found.kl:.4f} (expected {plan.expected:.4f}), perplexity "
            f"{as_is.ppl:.3f} -> {plan.found.ppl:.3f}: measured with these nodes quantized anew",
        ]
    )


class Attribute(Command):
    """Prints a table and the lines, and adds them to the report."""

    name = "attribute"
    help = "what each node costs, and which bits would buy the most"
    description = (
        "For a model whose perplexity or KL divergence is too high: put a node, a range of layers, all "
        "weights, all activations or the KV cache back to floating point, and measure the KL "
        "divergence of the next token that is left. Ranges of layers are halved where they gain most. "
        "What was measured is kept in OUT, so that a run that was stopped goes on."
    )
    out_help = "artifact folder of python -m exporter or python -m calibration"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The text, the float model, and how far to go."""
        add = parser.add_argument
        add_held_out(parser)
        add(
            "--first",
            type=whole_number(1),
            default=_WINDOWS,
            metavar="K",
            help=f"windows from the beginning of the text (default {_WINDOWS})",
        )
        add(
            "--seqlen",
            type=whole_number(2),
            default=_SEQLEN,
            metavar="L",
            help=f"tokens per window (default {_SEQLEN})",
        )
        add(
            "--minutes",
            type=number(0),
            default=0.0,
            metavar="M",
            help="begin no walk through the layers that would leave no time for the check of the lines; the "
            "first walk and the check always run (default 0: no bound)",
        )
        add(
            "--add-bits",
            type=number(0),
            default=_ADD_BITS,
            metavar="B",
            help=f"bits per weight on average that the lines may add (default {_ADD_BITS})",
        )
        add("--json", action="store_true", help="print one line of JSON")
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Measure and print."""
        from calibration.progress import make_progress
        from deploy.compare import CompareRequest

        request = CompareRequest(
            outs=(out,), text=args.text, model=args.model, first=args.first, seqlen=args.seqlen
        )
        progress = make_progress(args.progress)
        try:
            found = attribute_artifact(out, request, args.minutes, args.add_bits, progress)
        finally:
            progress.close()
        if args.json:
            print(json.dumps(found.as_dict()))
            return
        print(printable(text(out, found), keep="\n"))
        print(f"on {printable(found.text)}")
        if (out / REPORT / JSON_FILE).is_file():
            print(f"Report: {printable(shlex.quote(str(out / REPORT / HTML_FILE)))}")


COMMAND = Attribute()
