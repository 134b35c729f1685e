"""python -m deploy compare: any number of artifacts of one float model against it, in one table."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import MANIFEST, QUANT
from deploy.command import Command, add_held_out, add_progress, check_file
from plugins.cli import whole_number
from plugins.errors import InputError
from plugins.text import printable

if TYPE_CHECKING:
    from numpy import ndarray

    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel

__all__ = [
    "COMMAND",
    "CompareRequest",
    "Compared",
    "Row",
    "check_model",
    "compare",
    "contexts",
    "float_name",
    "markdown",
    "open_compared",
    "plot",
    "table",
    "text_of",
]

FLOAT = "float"
_WIDTH, _HEIGHT, _EDGE = 720, 400, 60  # of the plot, in pixels


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What is compared on what.

    Attributes:
        outs: artifact folders of one float model.
        text: a file as calibration.text_file.read_text takes it; None is the project's own text,
            which calibration has seen unless it was given another.
        model: the float model; None is the one that the first artifact names.
        first: windows from the beginning; 0 is all.
        seqlen: tokens of a window; 0 is 2048, or the context if that is less.
    """

    outs: Sequence[Path]
    text: Path | None = None
    model: str | None = None
    first: int = 20
    seqlen: int = 0


@dataclass(frozen=True)
class Row:
    """A model: its name, scheme and method, its bytes with all that is not quantized, bits per weight
    of the linears, and perplexity, share of predictions with the float model's token, and mean
    KL(float || model) in nats.
    """

    name: str
    scheme: str
    method: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    top1: float
    kl: float


def compare(request: CompareRequest, progress: Progress) -> list[Row]:
    """A row for the float model, then one for each artifact; one model is in memory at a time, besides
    the float model's head. fp32 arithmetic, with each model's activation quantization.

    Raises:
        InputError: an artifact cannot be read or is another model's, or the text is too short.
        CheckError: a model computes NaN.
    """
    from calibration.reference.model import FloatReference, float_model, quantised_model
    from exporter.proof.quality import FloatStates

    opened = open_compared(request)
    quants, checkpoint, longest = opened.quants, opened.checkpoint, opened.contexts
    windows = opened.windows
    progress.start("compare", len(windows) * (1 + len(quants)))
    states = FloatStates(FloatReference(float_model(checkpoint, longest[0])), windows, progress)
    sizes = quants[0].sizes
    found = states.compare(None, progress).means(FLOAT)
    whole, bits = int(sizes["model_float_bytes"]), 8 * sizes["linear_float_bytes"]
    rows = [_row(FLOAT, quants[0].scheme.dtype, "", whole, bits / sizes["linear_weights"], found)]
    for out, quant, most in zip(request.outs, quants, longest, strict=True):
        model = quantised_model(quant, round_activations=False, max_context=most)
        found = states.compare(model, progress).means(str(out))
        whole, bits = int(quant.sizes["model_quant_bytes"]), quant.sizes["bits_per_weight"]
        rows.append(_row(str(out), quant.label, quant.scheme.method, whole, bits, found))
        del model
    progress.finish()
    return rows


@dataclass(frozen=True)
class Compared:
    """What a request names, read and found to belong together.

    Attributes:
        quants: of the artifacts.
        checkpoint: their float model.
        contexts: most tokens of a sequence of each.
        windows: of the text, int64 [n, L].
    """

    quants: Sequence[QuantModel]
    checkpoint: Checkpoint
    contexts: Sequence[int]
    windows: ndarray


def open_compared(request: CompareRequest) -> Compared:
    """Open artifacts, float model and text.

    Raises:
        InputError: an artifact cannot be read or is another model's, or the text is too short.
    """
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.quant.folder import read_quant

    for out in request.outs:
        _check_folder(out)
    quants = [read_quant(out / QUANT) for out in request.outs]
    checkpoint = open_checkpoint(request.model or float_name(request.outs[0]), offline=True)
    for out, quant in zip(request.outs, quants, strict=True):
        check_model(out, quant, checkpoint)
    longest = contexts(request.outs, quants)
    return Compared(quants, checkpoint, longest, _windows(request, checkpoint, min(longest)))


def _check_folder(out: Path) -> None:
    if (out / QUANT).is_dir():
        return
    got = (
        "a folder without quant/"
        if out.is_dir()
        else "a file"
        if out.exists()
        else "no such folder"
    )
    raise InputError(
        str(out),
        f"got {got}, expected an artifact folder with quant/",
        "Give the whole OUT of python -m exporter or python -m calibration",
    )


def _row(
    name: str, scheme: str, method: str, size: int, bits: float, found: dict[str, float]
) -> Row:
    return Row(name, scheme, method, size, bits, found["ppl"], found["top1"], found["kl"])


def float_name(out: Path) -> str:
    """The float model that an artifact names.

    Raises:
        InputError: it names none.
    """
    from calibration.out.manifest import read_manifest

    path = out / MANIFEST
    if path.is_file() and (name := read_manifest(path)["request"].get("model")):
        return str(name)
    raise InputError(
        str(out), "got an artifact that names no float model, expected one", "Give it with --model"
    )


def check_model(out: Path, quant: QuantModel, checkpoint: Checkpoint) -> None:
    """Look whether an artifact was made of a float model.

    Raises:
        InputError: it was made of another.
    """
    made, given = quant.source["fingerprint"], checkpoint.fingerprint
    if made != given:
        raise InputError(
            str(out),
            f"got an artifact of another model (fingerprint {made[:12]}), expected one of "
            f"{checkpoint.name} ({given[:12]})",
            "Compare artifacts of one model, or name it with --model",
        )


def contexts(outs: Sequence[Path], quants: Sequence[QuantModel]) -> list[int]:
    """Most tokens of a sequence of each artifact.

    Raises:
        InputError: they are exports of contexts for which one model has different rotary frequencies.
    """
    from exporter.proof.options import max_context

    found = [max_context(out, quant) for out, quant in zip(outs, quants, strict=True)]
    long = [
        [rope.long(most) for rope in quant.decoder.ropes]
        for quant, most in zip(quants, found, strict=True)
    ]
    for out, most, turns in zip(outs, found, long, strict=True):
        if turns != long[0]:
            raise InputError(
                str(out),
                f"got an export for {most} tokens beside one for {found[0]} ({outs[0]}), expected the "
                f"same rotary frequencies in both, which longrope changes in between",
                "Export both with the same --max-seq",
            )
    return found


def _windows(request: CompareRequest, checkpoint: Any, longest: int) -> Any:
    from calibration.data import default_text, text_tokens, windows_from_tokens
    from exporter.proof.perplexity import select_windows, text_windows, window_length

    context = int(checkpoint.config.max_position_embeddings)
    if any(rope.short is not None for rope in checkpoint.decoder.ropes):
        context = longest  # beyond it the float model turns otherwise
        if request.seqlen > context:
            raise InputError(
                "--seqlen",
                f"got {request.seqlen}, expected at most {context}, the context of the exports",
                "Give less, or export with a larger --max-seq",
            )
    seqlen, vocab = window_length(context, request.seqlen), checkpoint.decoder.vocab
    if request.text is not None:
        windows = text_windows(checkpoint.tokenizer(), request.text, seqlen, vocab)
    else:
        tokens = text_tokens(checkpoint.tokenizer(), default_text(), vocab, "the default text")
        windows = windows_from_tokens(tokens, seqlen)
    return windows[select_windows(len(windows), 0, min(request.first, len(windows)))]


def text_of(request: CompareRequest) -> str:
    """What the numbers are of."""
    if request.text is not None:
        return printable(str(request.text))
    return "the project's own text, which calibration has seen unless --calib named another"


# ---------------------------------------------------------------- output


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        row.scheme,
        row.method,
        f"{row.bytes / 1e6:.1f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.perplexity:,.3f}",
        f"{row.top1:.1%}",
        f"{row.kl:.4f}",
    ]


_HEAD = ["", "bits", "method", "MB", "bits/weight", "perplexity", "top-1", "KL, nats"]
_TEXTS = 3  # columns of words


def table(rows: Sequence[Row]) -> str:
    """Lines in columns."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < _TEXTS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """The same as a table in Markdown."""
    rule = ["---"] * _TEXTS + ["---:"] * (len(_HEAD) - _TEXTS)
    cells = [[cell.replace("|", "\\|") for cell in _cells(row)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (_HEAD, rule, *cells))


def comma_separated(rows: Sequence[Row]) -> str:
    """All digits, with a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    return text.getvalue()


def plot(rows: Sequence[Row]) -> str:
    """An SVG of size against perplexity, both axes linear in their logarithms; the float model is a
    dashed line.
    """
    from exporter.report.chart import escape

    baseline, models = rows[0], rows[1:]

    def scale(values: Sequence[float], low: float, high: float) -> Any:
        logs = [math.log(value) for value in values]
        least, most = min(logs), max(logs)
        span = (most - least) or 1.0
        least, span = least - 0.08 * span, 1.16 * span
        return lambda value: low + (high - low) * (math.log(value) - least) / span

    x = scale([row.bytes for row in models], _EDGE, _WIDTH - _EDGE)
    y = scale([row.perplexity for row in rows], _HEIGHT - _EDGE, _EDGE / 2)
    level = y(baseline.perplexity)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Size against perplexity</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{_EDGE} {_EDGE / 2}V{_HEIGHT - _EDGE}H{_WIDTH - _EDGE}" fill="none" '
        'stroke="#5b6675"/>',
        f'<path d="M{_EDGE} {level:.1f}H{_WIDTH - _EDGE}" stroke="#12703a" '
        'stroke-dasharray="5 4"/>',
        f'<text x="{_WIDTH - _EDGE}" y="{level - 5:.1f}" text-anchor="end" fill="#12703a">float, '
        f"{baseline.perplexity:.2f}, {baseline.bytes / 1e6:.0f} MB</text>",
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 15}" text-anchor="middle">size, MB</text>',
        f'<text transform="translate(18 {_HEIGHT / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">perplexity</text>',
    ]
    for row in models:
        at = x(row.bytes), y(row.perplexity)
        end = at[0] > _WIDTH / 2
        label = f"{Path(row.name).name}: {row.bytes / 1e6:.0f} MB, {row.perplexity:,.2f}"
        parts.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="#1d5fd1"/>'
            f'<text x="{at[0] + (-8 if end else 8):.1f}" y="{at[1] - 6:.1f}" '
            f'text-anchor="{"end" if end else "start"}">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


class Compare(Command):
    """Prints a table, and writes it where it is told to."""

    name = "compare"
    help = "quality and size of several artifacts against their float model"
    description = (
        "Compare artifacts with their float model: perplexity, top-1 agreement, KL divergence, "
        "size, bits per weight."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The other artifacts, the text, and where the table goes."""
        add = parser.add_argument
        add("more", metavar="OUT", nargs="*", type=Path, help="further artifacts")
        add_held_out(parser)
        add(
            "--first",
            type=whole_number(0),
            default=20,
            metavar="K",
            help="windows from the beginning; 0: all (default 20)",
        )
        add(
            "--seqlen",
            type=whole_number(2),
            default=0,
            metavar="L",
            help="tokens per window (default: 2048, or the context if that is shorter)",
        )
        add("--csv", type=Path, metavar="FILE", help="write the table with all digits")
        add("--markdown", type=Path, metavar="FILE", help="write the table in Markdown")
        add("--plot", type=Path, metavar="FILE", help="write an SVG of size against perplexity")
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Compare, print and write."""
        from calibration.progress import make_progress

        request = CompareRequest(
            outs=(out, *args.more),
            text=args.text,
            model=args.model,
            first=args.first,
            seqlen=args.seqlen,
        )
        files = (
            ("--csv", args.csv, comma_separated),
            ("--markdown", args.markdown, markdown),
            ("--plot", args.plot, plot),
        )
        for option, path, _ in files:
            if path is not None:
                check_file(option, path)
        progress = make_progress(args.progress)
        try:
            rows = compare(request, progress)
        finally:
            progress.close()
        print(printable(table(rows), keep="\n"))
        print(f"on {text_of(request)}")
        for _, path, write in files:
            if path is not None:
                path.write_text(write(rows), encoding="utf-8")


COMMAND = Compare()
