"""python -m exporter MODEL --wbits W --abits A: quantise, export, build an engine, prove it,
report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from calibration.cli import add_quant_arguments, default_out, schemes_from_args, settings_from_args
from calibration.out.folder import command_for
from calibration.out.layout import HTML_FILE, ONNX, REPORT, STAGES
from exporter.pipeline import ExportRequest, run_pipeline
from plugins.cli import Parser, add_version, offline, program, run_cli, whole_number
from plugins.errors import InputError
from plugins.text import printable

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    parser = Parser(prog=program("exporter", "export"), description=__doc__)
    add_version(parser)
    add_quant_arguments(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=["auto", "tensorrt", "tensorrt-rtx", "none"],
        default="auto",
        help="auto: tensorrt where it imports and a GPU is there, else tensorrt-rtx (default: auto)",
    )
    engine.add_argument(
        "--max-batch",
        type=whole_number(1),
        default=1,
        metavar="B",
        help="largest batch of the profiles (default: 1)",
    )
    engine.add_argument(
        "--max-seq",
        type=whole_number(2),
        default=0,
        metavar="S",
        help="most tokens of a sequence, in the ONNX file and the engine; at most the model's "
        "context (default: 2048, or the context if that is less)",
    )
    engine.add_argument(
        "--kv",
        type=_cache_form,
        default=0,
        metavar="FORM",
        help="concat: the KV cache grows with each call (default); static:CAPACITY: it has room for "
        "so many tokens from the beginning, which is then --max-seq",
    )
    proof = parser.add_argument_group("report")
    proof.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="also score this text: the report then shows the perplexity",
    )
    proof.add_argument(
        "--eval-windows",
        type=whole_number(1),
        default=5,
        metavar="K",
        help="at most how many windows, from the beginning, of 2048 tokens or of --max-seq if that "
        "is less (default: 5)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--until", choices=STAGES, default=REPORT, help="last stage to run (default: report)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="keep what is finished, stages and parts of them, if its inputs did not change",
    )
    return parser


def _cache_form(text: str) -> int:
    """--kv: the capacity of a static cache; 0 is one that grows."""
    form, _, capacity = text.partition(":")
    if text == "concat":
        return 0
    if form != "static" or not capacity.isascii() or not capacity.isdecimal() or int(capacity) < 2:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected concat or static:CAPACITY, such as static:2048"
        )
    return int(capacity)


def _max_seq(args: argparse.Namespace) -> int:
    """--max-seq, or the capacity of a static cache."""
    if args.kv and args.max_seq not in (0, args.kv):
        raise InputError(
            "--max-seq",
            f"got {args.max_seq}, expected {args.kv}, the capacity that --kv gives",
            "Leave it out: a sequence has as many tokens as the cache has room for",
        )
    return int(args.kv or args.max_seq)


def print_summary(out: Path, manifest: dict[str, object]) -> None:
    """The table of stages on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(str(out))), title_justify="left")  # names are no markup
    for column in ("stage", "seconds", "peak MB", "size MB", "result"):
        table.add_column(column, justify="left" if column in ("stage", "result") else "right")
    stages = manifest["stages"]
    assert isinstance(stages, dict)
    for name, record in stages.items():
        size = sum(item["bytes"] for item in record["files"].values()) / 1e6
        table.add_row(
            Text(name),
            f"{record['seconds']:.1f}",
            f"{record['peak_rss'] / 1e6:.0f}",
            f"{size:.1f}",
            Text(printable(str(record.get("facts", {}).get("summary", "")))),
        )
    Console().print(table)


def last_lines(out: Path, manifest: dict[str, object]) -> str:
    """Where the report is, and what to do next."""
    stages = manifest["stages"]
    assert isinstance(stages, dict)
    lines = [f"Report: {out / REPORT / HTML_FILE}"] if REPORT in stages else []
    generate = ["python", "-m", "deploy", "generate", str(out), "--prompt", "Once upon a time"]
    following = shlex.join(generate) if ONNX in stages else command_for(out, REPORT)
    return "\n".join(map(printable, [*lines, f"Next: {following}"]))


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "torchrun",
            f"got {os.environ['WORLD_SIZE']} processes, expected one: only calibration is "
            f"shared among several",
            "Run python -m exporter alone, or torchrun -m calibration",
        )
    from calibration.progress import make_progress

    schemes = schemes_from_args(args)
    out = default_out(args, schemes.base)
    progress = make_progress(args.progress)
    request = ExportRequest(
        model=args.model,
        schemes=schemes,
        out=out,
        settings=settings_from_args(args, schemes.base),
        engine=args.engine,
        max_batch=args.max_batch,
        max_seq=_max_seq(args),
        static_cache=args.kv > 0,
        until=args.until,
        resume=args.resume,
        offline=args.offline,
        eval_text=args.eval,
        eval_windows=args.eval_windows,
        command=("python", "-m", "exporter", *(sys.argv[1:] if argv is None else argv)),
        format=args.format,
        budget=args.budget,
        requantize=args.requantize,
    )
    with offline(args.offline):
        manifest = run_pipeline(request, progress)
    if args.progress != "json":
        print_summary(out, manifest)
        print(last_lines(out, manifest))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 input, 3 a check failed, 1 anything else, 130
    interrupted.
    """
    return run_cli(
        lambda: _main(argv),
        "Interrupted; finished stages are kept. Run the same command with --resume to go on.",
        stdout_is_result=False,
    )


if __name__ == "__main__":
    sys.exit(main())
