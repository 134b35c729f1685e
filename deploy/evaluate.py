"""python -m deploy eval: perplexity of a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.command import Command, add_progress, add_runner
from exporter.run.model import CPU
from plugins.cli import whole_number

if TYPE_CHECKING:
    from calibration.progress import Progress
    from exporter.proof.perplexity import EvalRequest

__all__ = ["COMMAND", "evaluate"]


def evaluate(out: Path, request: EvalRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Score a text with the runner of the request; returns what exporter.proof.perplexity.score
    does.

    Raises:
        InputError: OUT, the text or the numbers are wrong. CheckError: the model computes NaN.
    """
    from exporter.proof.perplexity import score
    from exporter.run.model import find_model

    model = find_model(out, request.runner)
    with model.open() as session:
        return score(session, model, request, progress)


class Evaluate(Command):
    """Prints one line of JSON."""

    name = "eval"
    help = "perplexity of a text"
    description = (
        "Perplexity over non-overlapping windows, each scored alone, no BOS. The last line of "
        "stdout is JSON."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which text, which windows of it, which runner."""
        add = parser.add_argument
        add(
            "--text",
            required=True,
            type=Path,
            metavar="FILE",
            help="text file, JSON lines or a JSON document, also gzipped",
        )
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
            help="tokens per window (default: 2048, or the longest sequence if that is shorter)",
        )
        add_runner(parser, default=CPU)
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Score and print."""
        from calibration.progress import make_progress
        from exporter.proof.perplexity import EvalRequest

        request = EvalRequest(
            args.text,
            windows=args.windows,
            first=args.first,
            seqlen=args.seqlen,
            runner=args.runner,
        )
        progress = make_progress(args.progress)
        try:
            result = evaluate(out, request, progress)
        finally:
            progress.close()
        print(json.dumps(result))


COMMAND = Evaluate()
