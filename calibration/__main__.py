"""python -m calibration MODEL --wbits W --abits A: quantise a model into OUT/quant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.artifact import StageWriter, locked, read_json
from calibration.cli import add_quant_arguments, default_out, scheme_from_args, stand_in_notice
from calibration.progress import Progress, make_progress
from plugins.core.cli import run_cli
from plugins.core.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoint import Checkpoint
    from calibration.scheme import QuantScheme

__all__ = ["main"]


def _quantise(args: argparse.Namespace, progress: Progress) -> None:
    scheme = scheme_from_args(args)
    out = default_out(args, scheme)
    _refuse_exporters(out)
    if notice := stand_in_notice(args, scheme):
        progress.message(notice)

    from calibration.checkpoint import open_checkpoint
    from calibration.quantize import STAGE, QuantizeOptions, check_scheme, quant_bytes, quantize_model

    checkpoint = open_checkpoint(args.model, args.offline)
    check_scheme(checkpoint, scheme, args.format)
    _refuse_other(out / STAGE, checkpoint, scheme)
    options = QuantizeOptions(args.offline, args.calib, args.nsamples, args.seqlen, format=args.format)
    writer = StageWriter(out, STAGE, quant_bytes(checkpoint, scheme, args.format))
    with locked(out):
        _refuse_exporters(out)  # and again, now that nobody else writes
        _refuse_other(out / STAGE, checkpoint, scheme)
        with writer:
            facts = quantize_model(checkpoint, scheme, options, writer.path, progress)
    progress.message(f"{out / STAGE}: {facts['summary']}")


def _refuse_exporters(out: Path) -> None:
    if (out / "manifest.json").exists():
        raise InputError(str(out), "got a folder with manifest.json, which python -m exporter keeps, expected another",
                         "Choose another --out, or run python -m exporter with --until quant")


def _refuse_other(folder: Path, checkpoint: Checkpoint, scheme: QuantScheme) -> None:
    """An existing quant folder is replaced only by the same model in the same setting."""
    if not folder.exists():
        return
    from calibration.quant_folder import QUANT_JSON

    fix = "Choose another --out, or delete this folder"
    try:
        meta = read_json(folder / QUANT_JSON)
    except InputError as error:
        raise InputError(str(folder), f"got a folder without a readable {QUANT_JSON} ({error.problem})", fix) from None
    source, found = (value if isinstance(value := meta.get(key), dict) else {} for key in ("source", "scheme"))
    if source.get("fingerprint") != checkpoint.fingerprint:
        raise InputError(str(folder), f"got a model quantised from other weights (of {source.get('name')}), "
                         f"expected those of {checkpoint.name}", fix)
    wanted = scheme.as_dict()
    different = [key for key, value in wanted.items() if found.get(key) != value]
    if different:
        got, expected = (", ".join(f"{key} {values.get(key)}" for key in different) for values in (found, wanted))
        raise InputError(str(folder), f"got a model quantised with {got}, expected {expected}", fix)


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser("python -m calibration", description="Quantise a model into OUT/quant.")
    add_quant_arguments(parser)
    args = parser.parse_args(argv)
    progress = make_progress(args.progress)
    try:
        _quantise(args, progress)
    finally:
        progress.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
