"""python -m calibration MODEL --wbits W --abits A: quantise a model into OUT/quant."""

from __future__ import annotations

import argparse
import sys

from calibration.artifact import StageWriter
from calibration.cli import add_quant_arguments, default_out, scheme_from_args, stand_in_notice
from calibration.progress import make_progress
from plugins.core.cli import run_cli
from plugins.core.errors import InputError

__all__ = ["main"]


def _quantise(args: argparse.Namespace) -> int:
    scheme = scheme_from_args(args)
    out = default_out(args, scheme)
    if (out / "manifest.json").exists():
        raise InputError(str(out), "got a folder with manifest.json, which python -m exporter keeps, expected another",
                         "Choose another --out, or run python -m exporter with --until quant")
    progress = make_progress(args.progress)
    notice = stand_in_notice(args, scheme)
    if notice:
        progress.message(notice)

    from calibration.checkpoint import open_checkpoint
    from calibration.quantize import STAGE, QuantizeOptions, check_scheme, quant_bytes, quantize_model

    checkpoint = open_checkpoint(args.model, args.offline)
    check_scheme(checkpoint, scheme)
    options = QuantizeOptions(args.offline, args.calib, args.nsamples, args.seqlen)
    with StageWriter(out, STAGE, quant_bytes(checkpoint, scheme)) as writer:
        facts = quantize_model(checkpoint, scheme, options, writer.path, progress)
    progress.message(f"{out / STAGE}: {facts['summary']}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m calibration", description="Quantise a model into OUT/quant.")
    add_quant_arguments(parser)
    return run_cli(lambda: _quantise(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
