"""python -m calibration MODEL --wbits W --abits A: quantise a model into OUT/quant."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.blocks.ranks import Ranks, join_ranks
from calibration.cli import add_quant_arguments, default_out, schemes_from_args, settings_from_args
from calibration.out.files import StageWriter, discard, locked
from calibration.out.json_file import read_json
from calibration.out.layout import MANIFEST, QUANT, QUANT_JSON, SENSITIVITY, WORK
from calibration.progress import NullProgress, Progress, make_progress
from plugins.cli import Parser, add_version, offline, program, run_cli
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.bits import SchemeMap

__all__ = ["main"]


def _quantise(args: argparse.Namespace, ranks: Ranks, progress: Progress) -> None:
    schemes = schemes_from_args(args)
    out = default_out(args, schemes.base)
    settings = settings_from_args(args, schemes.base)

    from calibration.budget.choice import Budget, bits_within, schemes_within
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.checkpoints.sources import check_name
    from calibration.quant.checks import check_scheme
    from calibration.quant.keep import check_quantized
    from calibration.quant.quantize import QuantizeOptions, kept_bytes, quant_bytes, quantize_model

    options = QuantizeOptions(
        args.offline, settings, out / WORK, args.resume, format=args.format, ranks=ranks
    )
    check_name(args.model)  # a mistyped name is not a wrong --out
    _refuse_exporters(out)
    checkpoint = open_checkpoint(args.model, args.offline)
    if note := check_quantized(checkpoint, args.keep, args.requantize):
        progress.message(note)
    check_scheme(checkpoint, schemes, args.format)
    budget = (
        None
        if args.budget is None
        else Budget(
            args.budget,
            schemes.base,
            settings,
            args.format,
            args.offline,
            out / SENSITIVITY,
            args.resume,
            ranks,
            schemes.head_bits,
            schemes.head_limit,
        )
    )
    if budget is not None:
        bits_within(checkpoint, budget)
    if not ranks.first:  # calibrates with the first one, which alone locks the folder and writes it
        schemes = schemes if budget is None else schemes_within(checkpoint, budget, progress)
        quantize_model(checkpoint, schemes, options, out / QUANT, progress)
        return
    _refuse_other(out / QUANT, checkpoint, schemes, nodes=budget is None)
    needed = quant_bytes(checkpoint, schemes, args.format) - kept_bytes(out)
    writer = StageWriter(out, QUANT, needed)
    with locked(out, progress.message):
        _refuse_exporters(out)  # and again, now that nobody else writes
        if budget is not None:
            schemes = schemes_within(checkpoint, budget, progress)
        _refuse_other(out / QUANT, checkpoint, schemes)
        with writer:
            facts = quantize_model(checkpoint, schemes, options, writer.path, progress)
        discard(out / WORK)
    progress.message(f"{out / QUANT}: {facts['summary']}")


def _refuse_exporters(out: Path) -> None:
    if (out / MANIFEST).exists():
        raise InputError(
            str(out),
            f"got a folder with {MANIFEST}, which python -m exporter keeps, expected another",
            "Choose another --out, or run python -m exporter with --until quant",
        )


def _refuse_other(
    folder: Path, checkpoint: Checkpoint, schemes: SchemeMap, nodes: bool = True
) -> None:
    """An existing quant folder is replaced only by the same model in the same setting, of each node
    too where these are known.
    """
    if not folder.exists():
        return
    fix = "Choose another --out, or delete this folder"
    try:
        meta = read_json(folder / QUANT_JSON)
    except InputError as error:
        raise InputError(
            str(folder), f"got a folder without a readable {QUANT_JSON} ({error.problem})", fix
        ) from None
    source, found, layers = (
        value if isinstance(value := meta.get(key), dict) else {}
        for key in ("source", "scheme", "layers")
    )
    if source.get("fingerprint") != checkpoint.fingerprint:
        raise InputError(
            str(folder),
            f"got one of another model or config (of {source.get('name')}), "
            f"expected those of {checkpoint.name}",
            fix,
        )
    _refuse_other_head(folder, meta.get("head"), schemes, fix)
    known = schemes.nodes(checkpoint.decoder) if nodes else {}
    for place, scheme in (
        ("", schemes.base),
        *((f" in {node}", scheme) for node, scheme in known.items()),
    ):
        own = layers.get(place.removeprefix(" in "))
        fields, wanted = own if isinstance(own, dict) else found, scheme.as_dict()
        different = [key for key, value in wanted.items() if fields.get(key) != value]
        if different:
            got, expected = (
                ", ".join(f"{key} {values.get(key)}" for key in different)
                for values in (fields, wanted)
            )
            raise InputError(
                str(folder), f"got a model quantised with {got}{place}, expected {expected}", fix
            )


def _refuse_other_head(folder: Path, found: object, schemes: SchemeMap, fix: str) -> None:
    if schemes.head_limit is not None:  # either is what was asked for
        return
    wanted = None if schemes.head is None else schemes.head.as_dict()
    if found != wanted:
        got, expected = (
            f"wbits {fields.get('wbits')}" if isinstance(fields, dict) else "a float table"
            for fields in (found, wanted)
        )
        raise InputError(
            str(folder), f"got a model with {got} for its head, expected {expected}", fix
        )


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        program("calibration", "calibrate"), description="Quantise a model into OUT/quant."
    )
    add_version(parser)
    add_quant_arguments(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the blocks and weight files that an interrupted run has finished",
    )
    ranks = join_ranks()
    with ranks.one_voice():
        with (
            nullcontext() if ranks.first else redirect_stderr(io.StringIO())
        ):  # argparse tells of its errors by itself
            args = parser.parse_args(argv)
        progress = make_progress(args.progress) if ranks.first else NullProgress()
        try:
            with offline(args.offline):
                _quantise(args, ranks, progress)
        finally:
            progress.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(
        lambda: _main(argv),
        "Interrupted; what is finished is kept. Run the same command with --resume to go on.",
        stdout_is_result=False,
    )


if __name__ == "__main__":
    sys.exit(main())
