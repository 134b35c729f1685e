"""What a proof is asked for, and the text, the float model and the length that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.out.description import read_description
from calibration.out.layout import DESCRIPTION, ONNX
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel

__all__ = [
    "REFERENCE",
    "ValidateOptions",
    "float_checkpoint",
    "max_context",
    "proof_text",
    "text_rows",
]

REFERENCE = "torch"  # the runner whose model the torch reference is


@dataclass(frozen=True)
class ValidateOptions:
    """What is run.

    Attributes:
        calib: text file or dataset; None is the text shipped with the project.
        option: the command line's name of the text, for messages.
        offline: never use the network.
        model: the float model that was quantised; without it neither the weights nor the
            quantisation error are checked.
        tokens: length of the prefill; with the steps cut to the context. None: 64, or as many as cross
            the smallest attention window, at most 1024 (memory.Calls).
        steps: greedy decode steps.
        runners: names of exporter/run to be compared with onnxruntime, which leads; one that cannot
            run is an error then. None: all that can, and a note about the others.
        layers: the decoder layers (first, end) that are judged; None: all.
        against: OUT of another artifact of the same float model, compared too.
    """

    calib: str | None = None
    option: str = "--calib"
    offline: bool = True
    model: str | None = None
    tokens: int | None = None
    steps: int = 8
    runners: tuple[str, ...] | None = None
    layers: tuple[int, int] | None = None
    against: Path | None = None

    @property
    def text_name(self) -> str:
        """What a report calls the text."""
        return self.calib or "the project's default text"

    def wants(self, runner: str) -> bool:
        """Whether a runner takes part where it can."""
        return self.runners is None or runner in self.runners

    def asks_for(self, runner: str) -> bool:
        """Whether a runner was named, so that it has to take part."""
        return self.runners is not None and runner in self.runners


def max_context(out: Path, quant: QuantModel) -> int:
    """Most tokens of a sequence, as model.json says; a graph that was written without one goes as far
    as the model.
    """
    path = out / ONNX / DESCRIPTION
    if path.is_file():
        return read_description(path, "Export the model again")[0].max_context
    return int(quant.config["max_position_embeddings"])


def float_checkpoint(quant: QuantModel, options: ValidateOptions) -> Checkpoint | str:
    """The float model that was quantised, or why it cannot be had."""
    from calibration.checkpoints.checkpoint import open_checkpoint

    lost = "neither the weights nor the quantisation error were checked"
    if options.model is None:
        return f"No float model was given, so {lost}."
    try:
        checkpoint = open_checkpoint(options.model, options.offline)
    except InputError as error:
        return f"The float model could not be opened, so {lost}. {error}"
    if checkpoint.fingerprint == quant.source["fingerprint"]:
        return checkpoint
    return (
        f"The float model at {checkpoint.source.path} is not the one that was quantised, so {lost}."
    )


def text_rows(quant: QuantModel, options: ValidateOptions, rows: int, tokens: int) -> np.ndarray:
    """The beginning of the text as tokens int64 [rows, tokens]; a short one is repeated."""
    from calibration.data import text_tokens

    found = text_tokens(quant.tokenizer(), proof_text(options), quant.decoder.vocab, options.option)
    return np.resize(found, (rows, tokens))


def proof_text(options: ValidateOptions) -> str:
    """The whole text."""
    from calibration.data import load_text

    return load_text(options.calib, options.offline, strict=False, where=options.option)
