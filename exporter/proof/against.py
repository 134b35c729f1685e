"""The level of a proof that compares another artifact of the same float model."""

from __future__ import annotations

from calibration.out.layout import ONNX, QUANT
from calibration.quant.folder import QuantModel, read_quant
from exporter.graph.names import layer_output
from exporter.proof.basis import RotatedRunner, turned
from exporter.proof.comparison import ONNX_RUNTIME, Comparison, Outputs
from exporter.proof.judge import AGAINST
from exporter.proof.runners import ReplayRunner
from exporter.proof.scope import Scope
from exporter.run.onnxruntime import OnnxSession
from exporter.run.sessions import DecoderSession
from plugins.errors import InputError

__all__ = ["open_other", "run_against", "same_codes"]

_SIZES = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size")


def open_other(scope: Scope) -> QuantModel | None:
    """The artifact to compare with, if one was given.

    Raises:
        InputError: it has no quant folder, or another decoder.
    """
    if scope.options.against is None:
        return None
    other = read_quant(scope.options.against / QUANT)
    for name in (*_SIZES, "max_position_embeddings"):
        if (got := other.config[name]) != (expected := scope.quant.config[name]):
            raise InputError(
                f"--against {scope.options.against}",
                f"got a model with {name} {got}, expected {expected} as in {scope.out}",
                "Give an artifact of the same float model",
            )
    return other


def run_against(proof: Comparison, record: list[Outputs], other: QuantModel) -> None:
    """Another artifact's ONNX model against this one's, in this one's coordinates."""
    scope = proof.scope

    def open_session() -> DecoderSession:
        marked = [layer_output(index) for index in scope.layers]
        return OnnxSession(other.path.parent / ONNX, scope.room, marked)

    runners = [
        ReplayRunner(ONNX_RUNTIME, record),
        RotatedRunner(AGAINST, open_session, turned(scope.quant, other)),
    ]
    proof.compare(runners, {AGAINST: (0, 1)}, each=lambda: None)


def same_codes(proof: Comparison, other: QuantModel) -> bool:
    """Whether two artifacts hold the same numbers, so that they must compute the same; says so
    where they do not.
    """
    scope = proof.scope
    mine, theirs = (
        {name: digest for name, digest in quant.files.items() if name.endswith(".safetensors")}
        for quant in (scope.quant, other)
    )
    if mine == theirs:
        return True
    proof.notes.append(
        f"{scope.options.against} holds other codes ({other.label}), so its differences are shown "
        "and not judged."
    )
    return False
