"""Perplexity of an artefact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.progress import Progress
from deploy.artifact import open_artifact
from exporter.proof.perplexity import EvalRequest, score

__all__ = ["evaluate"]


def evaluate(out: Path, request: EvalRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Score a text with the runner of the request; returns what exporter.proof.perplexity.score
    does.

    Raises:
        InputError: OUT, the text or the numbers are wrong. CheckError: the model computes NaN.
    """
    quant, session, _ = open_artifact(out, request.runner)
    with session:
        return score(session, quant, request, progress)
