"""python -m deploy eval: perplexity of a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import QUANT, QUANT_JSON
from deploy.command import Command, add_progress, add_runner
from exporter.run.model import CPU
from plugins.cli import whole_number
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress
    from exporter.proof.perplexity import EvalRequest

__all__ = ["COMMAND", "FloatModel", "evaluate"]


def evaluate(
    out: Path,
    request: EvalRequest,
    progress: Progress | None = None,
    beside: FloatModel | None = None,
) -> dict[str, Any]:
    """Score a text with the runner of the request; returns what exporter.proof.perplexity.score
    does, and "float_ppl" of a float model beside it.

    Raises:
        InputError: OUT, the text or the numbers are wrong; there is no float model, or it is another
            one's. CheckError: a model computes NaN.
    """
    from exporter.proof.perplexity import score
    from exporter.run.model import find_model

    model = find_model(out, request.runner)
    checkpoint = None if beside is None else _checkpoint(out, beside)
    with model.open() as session:
        found = score(session, model, request, progress)
    if checkpoint is None:
        return found
    from calibration.reference.model import FloatReference, float_model
    from exporter.run.reference import TorchSession

    longest = model.description.max_context
    reference = FloatReference(float_model(checkpoint, longest))
    with TorchSession(reference, max_context=longest) as session:
        return found | {"float_ppl": score(session, model, request, progress)["ppl"]}


@dataclass(frozen=True)
class FloatModel:
    """The float model that is scored beside an artifact.

    Attributes:
        name: of it, as the exporter takes it; None is the one that the artifact was made from.
    """

    name: str | None = None


def _checkpoint(out: Path, beside: FloatModel) -> Checkpoint:
    """Opened before anything is scored, and held against quant/ where that is there."""
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.quant.folder import read_quant
    from deploy.compare import check_model, float_name

    checkpoint = open_checkpoint(beside.name or float_name(out), offline=True)
    if (out / QUANT / QUANT_JSON).is_file():
        check_model(out, read_quant(out / QUANT, verify=False), checkpoint)
    return checkpoint


class Evaluate(Command):
    """Prints one line of JSON."""

    name = "eval"
    takes_packs = True
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
        add(
            "--float",
            action="store_true",
            dest="beside",
            help="score the float model too: float_ppl, in the same windows, in fp32 by transformers",
        )
        add(
            "--model", metavar="MODEL", help="the float model of --float (default: as OUT names it)"
        )
        add_runner(parser, default=CPU)
        add_progress(parser)

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Score and print."""
        from calibration.progress import make_progress
        from exporter.proof.perplexity import EvalRequest

        if args.model is not None and not args.beside:
            raise InputError(
                "--model",
                f"got {args.model} without --float, expected both or neither",
                "Add --float",
            )
        request = EvalRequest(
            args.text,
            windows=args.windows,
            first=args.first,
            seqlen=args.seqlen,
            runner=args.runner,
        )
        progress = make_progress(args.progress)
        try:
            beside = FloatModel(args.model) if args.beside else None
            result = evaluate(out, request, progress, beside)
        finally:
            progress.close()
        print(json.dumps(result))


COMMAND = Evaluate()
