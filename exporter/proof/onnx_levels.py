"""The levels of a proof that ONNX Runtime runs: function bodies, native kernels, and the session that users
open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.out.layout import ONNX
from exporter.proof.comparison import NATIVE, ONNX_RUNTIME, Comparison, Outputs
from exporter.proof.options import REFERENCE
from exporter.proof.pieces import FoldedSession, OnnxPiece, Piece, PieceSession, cut, run_pieces
from exporter.proof.runners import LedRunner, ReplayRunner, SessionRunner
from exporter.run.native import NativeSession, native_library
from exporter.run.onnxruntime import OnnxSession, load_model

if TYPE_CHECKING:
    from exporter.run.sessions import DecoderSession

__all__ = ["native_kernels", "run_bodies", "run_folded", "run_native", "run_users"]


def native_kernels(proof: Comparison) -> Path | None:
    """The library of native kernels; None, with a note, where there is none.

    Raises:
        InputError: there is none, and the runner was asked for.
    """
    scope = proof.scope
    if not scope.options.wants(NATIVE):
        return None
    library = native_library(proof.progress.message)
    if scope.options.asks_for(NATIVE) and not isinstance(library, Path):
        raise library
    if isinstance(library, Path):
        return library
    proof.notes.append(
        f"The native CPU kernels could not be built, so they were not run. {library}"
    )
    return None


def run_bodies(proof: Comparison, library: Path | None, folded: bool) -> list[Outputs]:
    """What ONNX Runtime computes at each call, by the function bodies; where they do not all fit into
    the memory by native kernels, or without them layer by layer. Its own next tokens lead the
    decode steps.

    Args:
        library: of native kernels, if there is one.
        folded: whether the bodies do not fit at once.
    """
    from polygraphy.comparator import Comparator

    scope = proof.scope

    def open_session() -> DecoderSession:
        folder, dtype = scope.out / ONNX, scope.quant.scheme.dtype
        if folded and library is None:
            layers = scope.quant.layers
            return FoldedSession(folder, scope.context, scope.marked, dtype, layers)
        kernels = library if folded else None
        return OnnxSession(folder, scope.context, scope.marked, dtype, kernels=kernels)

    leader = SessionRunner(ONNX_RUNTIME, open_session)
    record: list[Outputs] = []
    for _ in Comparator.run([leader], proof.feeds(leader), streaming=True):
        record.append(dict(leader.outputs))
        proof.progress.advance(note=f"{ONNX_RUNTIME}, {proof.calls[-1].phase}")
    return record


def run_native(proof: Comparison, record: list[Outputs], library: Path) -> None:
    """The native kernels in ONNX Runtime against the function bodies, each operator on the
    bodies' tensors, from what the first judged layer reads on.
    """
    scope = proof.scope

    def open_session() -> OnnxSession:
        return OnnxSession(
            scope.out / ONNX,
            scope.context,
            scope.marked,
            scope.quant.scheme.dtype,
            kernels=library,
            given=scope.given,
        )

    bodies = ReplayRunner(ONNX_RUNTIME, record)
    runners = [bodies, LedRunner(NATIVE, open_session, bodies)]
    proof.compare(runners, {NATIVE: (0, 1)}, each=lambda: None)


def run_folded(proof: Comparison, record: list[Outputs], library: Path) -> None:
    """The function bodies, one decoder layer after the other, against the native kernels that made
    the record, each operator on the kernels' tensors.
    """
    scope = proof.scope
    folder, dtype = scope.out / ONNX, scope.quant.scheme.dtype
    model, layers = load_model(folder), scope.quant.layers
    found = [
        cut(model, index, index + 1, layers, scope.marked, scope.given)
        for index in range(scope.layers.start, scope.layers.stop + scope.to_the_end)
    ]

    @contextmanager
    def opened(piece: Piece) -> Iterator[PieceSession]:
        proof.progress.advance(0, note=f"function bodies, layer {piece.first}")
        yield PieceSession(piece, OnnxPiece(piece, folder), scope.context, dtype)

    calls = [(call.feed["input_ids"], call.feed["attention_mask"]) for call in proof.calls]
    bodies = run_pieces(found, calls, opened, record, led=True)
    runners = [ReplayRunner(ONNX_RUNTIME, bodies), ReplayRunner(NATIVE, record)]
    proof.compare(runners, {NATIVE: (0, 1)}, each=lambda: None)


def run_users(proof: Comparison) -> tuple[list[Outputs], list[Outputs]]:
    """Logits and cache of the session that users open at each call; and all that runs through it
    where that is shown, with a warning where showing changes what ONNX Runtime computes.
    """
    scope = proof.scope
    folder, dtype = scope.out / ONNX, scope.quant.scheme.dtype
    with NativeSession(folder, scope.context, dtype, ()) as session:
        plain = list(proof.stepped(session))
    if not scope.options.wants(REFERENCE):
        return plain, []
    with NativeSession(folder, scope.context, dtype, scope.marked) as session:
        shown = list(proof.stepped(session))
    changed = sum(
        not np.array_equal(one["logits"], other["logits"])
        for one, other in zip(plain, shown, strict=True)
    )
    if changed:
        proof.warnings.append(
            f"Where inner tensors are outputs too, ONNX Runtime computes other logits of the file "
            f"in {changed} of {len(plain)} calls. Judged as run are the logits and the cache of the "
            "file as users run it, and the operators of the file whose inner tensors are shown."
        )
    return plain, shown
