"""python -m deploy generate | eval | trtexec: run an artefact folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.artifact import GENERATE_RUNNERS
from plugins.cli import number, run_cli, whole_number

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy", description="Run what python -m exporter made."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(
        commands.add_parser(
            "generate", help="continue a prompt", description="Print a prompt and its continuation."
        )
    )
    _add_eval(
        commands.add_parser(
            "eval",
            help="perplexity of a text",
            description="Perplexity over non-overlapping windows, each scored alone, no BOS. "
            "The last line of stdout is JSON.",
        )
    )
    trtexec = commands.add_parser(
        "trtexec",
        help="print trtexec commands for the engine",
        description="Print the commands that build and time the engine with NVIDIA's own tool.",
    )
    _add_out(trtexec)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="artefact folder of python -m exporter"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_out(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="the text to continue")
    add(
        "--max-new-tokens",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="most tokens to add (default 128)",
    )
    add(
        "--runner",
        choices=GENERATE_RUNNERS,
        default="auto",
        help="auto: tensorrt where there is a GPU and an engine for it, else onnxruntime (default)",
    )
    add(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="T",
        help="0: always the best token (default); 1: the model's own odds",
    )
    add(
        "--top-k",
        type=whole_number(0),
        default=0,
        metavar="K",
        help="draw among the K best only; 0: all (default)",
    )
    add("--seed", type=whole_number(0), default=0, metavar="S", help="of the draws (default 0)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print tokens as they come (default: on a terminal)",
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_out(parser)
    add = parser.add_argument
    add("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text file")
    add(
        "--first",
        type=whole_number(1),
        default=0,
        metavar="K",
        help="score the first K windows (default: all)",
    )
    add(
        "--windows",
        type=whole_number(1),
        default=0,
        metavar="N",
        help="score N windows, spread evenly over these (default: all)",
    )
    add(
        "--seqlen",
        type=whole_number(2),
        default=0,
        metavar="L",
        help="tokens per window (default 2048, or the model's context if shorter)",
    )
    add(
        "--runner",
        choices=("torch", "onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="torch: the dequantised reference with the same activation quantisation (default "
        "onnxruntime)",
    )
    add(
        "--progress",
        default="auto",
        choices=("auto", "rich", "plain", "json", "none"),
        help="json: one object per line on stdout",
    )


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "generate":
        from deploy.generate import GenerateRequest, generate_text
        from deploy.sampling import Sampling

        stream = sys.stdout.isatty() if args.stream is None else args.stream
        sampling = Sampling(args.temperature, args.top_k, args.seed)
        generate_text(
            args.out,
            GenerateRequest(args.prompt, args.max_new_tokens, args.runner, sampling, stream),
        )
    elif args.command == "eval":
        from calibration.progress import make_progress
        from deploy.evaluate import evaluate
        from exporter.proof.perplexity import EvalRequest

        request = EvalRequest(args.text, args.windows, args.first, args.seqlen, args.runner)
        progress = make_progress(args.progress)
        try:
            result = evaluate(args.out, request, progress)
        finally:
            progress.close()
        print(json.dumps(result))
    else:
        from deploy.trtexec import script

        print(script(args.out))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 input, 3 a check failed, 1 anything else, 130
    interrupted.
    """
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
