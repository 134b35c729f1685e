"""The levels of a proof that TensorRT runs: the engine, and proof engines with inner tensors as outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calibration.out.folder import open_stage, stages_in
from calibration.out.layout import ENGINE, ENGINE_FILE, ONNX
from exporter.engine.build import EngineOptions
from exporter.proof.comparison import TENSORRT, Comparison, Outputs
from exporter.proof.engine import ProofEngines
from exporter.proof.judge import PROOF_ENGINE
from exporter.proof.pieces import Piece, PieceSession, pieces, run_pieces
from exporter.proof.scope import Scope
from exporter.run import find_runner
from exporter.run.onnxruntime import load_model

if TYPE_CHECKING:
    from exporter.run.sessions import DecoderSession

__all__ = [
    "FUSED",
    "PROOF_ENGINES",
    "build_proof_engines",
    "compare_engines",
    "find_engine",
    "find_proof_engines",
    "judged_pieces",
    "run_engine",
    "run_proof_engines",
]

PROOF_ENGINES = "tensorrt, with inner tensors"
FUSED = "engine with inner tensors"  # against the one without
_PIECE = 1 << 30  # bytes of weights in a proof engine


def find_engine(proof: Comparison) -> Callable[[], DecoderSession] | None:
    """Opens the engine; None, with a note, where this export has no engine or it cannot run here.

    Raises:
        InputError: there is no engine, and the runner was asked for.
    """
    scope = proof.scope
    if not scope.options.wants(TENSORRT):
        return None
    folder, tensorrt = scope.out / ENGINE, find_runner(TENSORRT)
    asked = scope.options.asks_for(TENSORRT)
    if not asked and ENGINE not in stages_in(scope.out):
        stale = f"; {folder} holds an earlier export's" if (folder / ENGINE_FILE).is_file() else ""
        proof.notes.append(f"No engine was built, so the CUDA kernels were not run{stale}.")
        return None
    why = f"--runner {TENSORRT}" if asked else "the validation"
    static = open_stage(scope.out, ENGINE, why).description().cache.capacity is not None
    if tensorrt.unavailable():
        proof.notes.append(
            "No GPU here: the engine was built but not run, so the CUDA kernels were not "
            "executed in this validation."
        )
        return None
    if static:
        proof.notes.append(
            "The engine has a static cache, which the validation cannot run, so the CUDA kernels "
            "were not executed in it."
        )
        return None

    def open_session() -> DecoderSession:
        stage = open_stage(scope.out, ENGINE, "the validation")
        return tensorrt.open(stage, tensorrt.describe(stage))

    return open_session


def run_engine(proof: Comparison, engine: Callable[[], DecoderSession]) -> list[Outputs]:
    """What the engine computes at each call; nothing at those of more sequences than it takes."""
    with engine() as session:
        most = getattr(session, "max_batch", None)
        record = [
            next(proof.stepped(session, [call]))
            if most is None or len(call.feed["input_ids"]) <= most
            else {}
            for call in proof.calls
        ]
    if not all(record):
        proof.notes.append(
            f"The engine takes {most} sequence{'s' * (most != 1)} at once, so the padded batch was "
            "not run in it."
        )
    return record


def find_proof_engines(proof: Comparison) -> ProofEngines | None:
    """What builds engines with inner tensors as outputs, where TensorRT was asked for.

    Raises:
        InputError: the TensorRT that built the engine is not here.
    """
    scope = proof.scope
    if not scope.options.asks_for(TENSORRT):
        return None
    stage = open_stage(scope.out, ENGINE, f"--runner {TENSORRT}")
    most = scope.tokens + scope.steps
    longest = EngineOptions(max_batch=2, max_seq=most, max_logits=2 * most)
    return ProofEngines(stage, scope.out / ONNX, longest)


def judged_pieces(scope: Scope) -> list[Piece]:
    """The judged layers of the graph, with the head behind the last one, in pieces."""
    judged = range(scope.layers.start, scope.layers.stop + scope.to_the_end)
    model = load_model(scope.out / ONNX)
    return pieces(model, scope.quant.layers, scope.marked, _PIECE, judged)


def build_proof_engines(proof: Comparison, engines: ProofEngines, found: list[Piece]) -> None:
    """Build them all, and say what was seen: nothing is run in them."""
    for piece in found:
        engines.check(piece)
        proof.progress.advance(note=f"{PROOF_ENGINE}, layer {piece.first}")
    proof.notes.append(
        f"TensorRT was half done: {engines.built} were built, and give what the graph says in its "
        "types; they were not run."
    )


def run_proof_engines(
    proof: Comparison, engines: ProofEngines, found: list[Piece], record: list[Outputs]
) -> list[Outputs]:
    """What they compute at each call, all their tensors."""
    scope = proof.scope

    @contextmanager
    def opened(piece: Piece) -> Iterator[PieceSession]:
        with engines.runner(piece) as runner:
            yield PieceSession(piece, runner, scope.context, scope.quant.scheme.dtype)
        proof.progress.advance(note=f"{PROOF_ENGINE}, layer {piece.first}")

    calls = [(call.feed["input_ids"], call.feed["attention_mask"]) for call in proof.calls]
    outputs = run_pieces(found, calls, opened, record)
    proof.notes.append(f"{engines.built} were built and run.")
    return outputs


def compare_engines(proof: Comparison) -> None:
    """Say how near the logits of the proof engines are to those of the engine."""
    errors = [
        error.relative
        for (comparison, _, tensor), error in proof.errors.items()
        if (comparison, tensor) == (FUSED, "logits")
    ]
    if largest := max(errors, default=0.0):
        proof.warnings.append(
            f"With inner tensors as outputs TensorRT computes other logits, by {largest:.2g}: it "
            "fuses otherwise. The operators judged are those of engines that show them."
        )
