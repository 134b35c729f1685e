"""Proves an export level by level: weights in quant/, ONNX Runtime, the TensorRT engine on a GPU,
and the cost of quantising.

What runs where:
- weights: every tensor in quant/ against the float model's, without running a model
  (weights.py).
- export: ONNX Runtime against the fake-quantised torch reference. ONNX Runtime runs the graph after
  round_every_op, which casts explicitly around standard ops, because its CPU
  provider has few 16-bit kernels. The file as it is runs in tests/exporter/graph/test_graph.py, in
  fp32.
- native: the same graph with the native CPU kernels in place of the function bodies. Each operator is
  given the tensors that the bodies made, and must give the same bits (A16 and attention: within
  rounding).
- as run: the session that users open, on the file as it is, against the graph with every rounding in
  its place: each operator of it in lockstep with the torch reference, and as a whole.
- kernel: the TensorRT engine, which is built from the file as it is, against ONNX Runtime. That
  engine shows no inner tensors, so only logits and the new tokens of the present KV cache are
  compared, with the limits for accumulated errors.
- engine: where TensorRT was asked for, engines of pieces of the graph with inner tensors as outputs,
  each operator in lockstep with the torch reference; without a GPU they are built and looked at.
- against: another artifact's ONNX model on the same tokens, where one is given.
- quantisation: the fake-quantised reference against the float model.

Where the function bodies of all nodes do not fit into the memory, the native kernels lead, and the bodies
are unpacked one decoder layer at a time and held against them.

One model is in memory at a time: ONNX Runtime's outputs are recorded and replayed beside the torch
reference.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calibration.out.fingerprint import digest
from calibration.out.layout import ONNX, REPORT
from calibration.progress import NullProgress, Progress
from exporter.engine.edition import captured_log
from exporter.graph.names import layer_of
from exporter.proof.against import open_other, run_against, same_codes
from exporter.proof.comparison import NATIVE, ONNX_RUNTIME, TENSORRT, Comparison, Found, Outputs
from exporter.proof.diagnose import causes
from exporter.proof.engine_levels import (
    build_proof_engines,
    compare_engines,
    find_engine,
    find_proof_engines,
    judged_pieces,
    run_engine,
    run_proof_engines,
)
from exporter.proof.files import check_tokenizer
from exporter.proof.judge import AGAINST, LayerReport, LeftOut, first_failure, judge, left_out
from exporter.proof.memory import check_memory
from exporter.proof.onnx_levels import native_kernels, run_bodies, run_folded, run_native, run_users
from exporter.proof.options import REFERENCE, ValidateOptions, float_checkpoint
from exporter.proof.result import ValidationResult
from exporter.proof.saved import SavedResults
from exporter.proof.scope import Scope
from exporter.proof.torch_levels import run_float, run_reference
from exporter.proof.weights import compare_weights, compared_tensors
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel
    from exporter.proof.engine import ProofEngines
    from exporter.proof.pieces import Piece
    from exporter.run.sessions import DecoderSession

__all__ = ["NO_FLOATS", "validate"]

T = TypeVar("T")

_RECORD = list[Outputs]  # what a level returns, as it is saved
_RECORDS = tuple[_RECORD, _RECORD]

NO_FLOATS = "The float model does not fit into the memory"
_GIVEN = re.compile(r" at (\S+)(?: \(with \S+\))? given its inputs ")  # first_failure's words


def validate(
    out: Path,
    options: ValidateOptions | None = None,
    progress: Progress | None = None,
    saved: SavedResults | None = None,
) -> ValidationResult:
    """Compare an artefact folder's ONNX model (and engine) with the torch references on real text.

    Args:
        out: OUT with quant/ and onnx/; engine/ takes part where there is a GPU.
        saved: keeps every level that is done.

    Raises:
        InputError: a stage is missing or damaged, the text is too short, or the memory does not
            suffice. CheckError: a node is missing, or the tokenizer is another model's.
    """
    began, scope = time.monotonic(), Scope(Path(out), options or ValidateOptions())
    proof = Comparison(scope, progress or NullProgress())
    fit = check_memory(scope.quant.decoder, scope.schemes, scope.all_tokens)
    proof.progress.message(f"{REPORT}: about {fit.needed / 1e9:.1f} GB of memory")
    checkpoint = _checkpoint(proof)
    if checkpoint and not fit.floats:
        proof.notes.append(f"{NO_FLOATS}, so what quantizing cost was not measured.")
    parts = _parts(proof, checkpoint if fit.floats else None)
    weights = compared_tensors(checkpoint, scope.quant, scope.layers) if checkpoint else 0
    steps = len(parts.pieces) + (scope.steps + 3) * parts.runs
    proof.progress.start(REPORT, weights + steps)
    rows, saved = list[LayerReport](), saved or SavedResults()
    if checkpoint:
        compare = partial(compare_weights, checkpoint, scope.quant, proof.progress, scope.layers)
        rows = saved.once("weights", list[LayerReport], compare, weights)
    with captured_log():
        _run(proof, parts, fit.folded, saved)
    proof.progress.finish()
    compare_engines(proof)
    stack = scope.stack()
    rows += judge(proof.errors, stack)
    if parts.other is not None and not same_codes(proof, parts.other):
        rows = [replace(row, limit=None) if row.level == AGAINST else row for row in rows]
    facts = {
        "tokens": scope.tokens,
        "steps": scope.steps,
        "text": scope.options.text_name,
        "seconds": round(time.monotonic() - began, 2),
    }
    if (lost := left_out(proof.errors, stack)).operators:
        facts["left_out"] = asdict(lost)
        proof.warnings.append(_unrounded(lost))
    failure = first_failure(proof.errors, rows, stack)
    if operator := _GIVEN.search(failure):
        layer = next(layer_of(row.tensor) for row in rows if not row.ok)
        facts["causes"] = causes(scope.quant, scope.out / ONNX, layer, operator[1])
    return ValidationResult(tuple(rows), failure, tuple(proof.notes), tuple(proof.warnings), facts)


def _checkpoint(proof: Comparison) -> Checkpoint | None:
    """The float model; None, with a note, where it cannot be had."""
    found = float_checkpoint(proof.scope.quant, proof.scope.options)
    if isinstance(found, str):
        proof.notes.append(found)
        return None
    check_tokenizer(proof.scope, found)
    return found


@dataclass(frozen=True)
class _Parts:
    """What takes part beside ONNX Runtime.

    Attributes:
        library: of native kernels.
        engine: opens the engine.
        engines: what builds proof engines, of `pieces` of the graph.
        other: another artifact.
        exported: whether the torch reference is compared.
        floats: the float model.
    """

    library: Path | None
    engine: Callable[[], DecoderSession] | None
    engines: ProofEngines | None
    pieces: list[Piece]
    other: QuantModel | None
    exported: bool
    floats: Checkpoint | None

    def stamp(self) -> list[bool]:
        """Which of them take part: what one level finds depends on the others' being there."""
        parts = (self.library, self.engine, self.engines, self.other, self.floats)
        return [*(part is not None for part in parts), self.exported]

    @property
    def referenced(self) -> bool:
        """Whether something is compared beside ONNX Runtime's record."""
        return self.exported or self.engine is not None or self.library is not None

    @property
    def runs(self) -> int:
        """How often every call is run."""
        found = [
            self.library,
            self.library,
            self.library and self.exported,
            self.other,
            self.engine,
            self.referenced,
            self.exported and self.floats,
        ]
        return any(found) + sum(map(bool, found))  # ONNX Runtime leads


def _parts(proof: Comparison, floats: Checkpoint | None) -> _Parts:
    """What can take part, and was asked for.

    Raises:
        InputError: nothing is left to compare, or what was asked for cannot be had.
    """
    engines = find_proof_engines(proof)
    parts = _Parts(
        native_kernels(proof),
        find_engine(proof),
        engines,
        judged_pieces(proof.scope) if engines else [],
        open_other(proof.scope),
        proof.scope.options.wants(REFERENCE),
        floats,
    )
    if not parts.runs and engines is None:
        raise InputError(
            "--runner",
            f"got {ONNX_RUNTIME} alone, expected another one to compare it with",
            f"Add {NATIVE}, {TENSORRT} or {REFERENCE}, separated by commas",
        )
    return parts


def _run(proof: Comparison, parts: _Parts, folded: bool, saved: SavedResults) -> None:
    """Every level that runs a model, one after the other.

    Args:
        folded: whether the function bodies of all nodes do not fit into the memory.
        saved: keeps them.
    """
    calls, made_of = proof.scope.steps + 3, digest(folded, *parts.stamp())
    record, users = list[Outputs](), (list[Outputs](), list[Outputs]())
    played, proven, references = list[Outputs](), list[Outputs](), list[Outputs]()

    def level(name: str, kind: Any, steps: int, work: Callable[..., T], *arguments: Any) -> T:
        apart = partial(proof.apart, partial(_freed, work), *arguments)
        returned, found = saved.once(name, tuple[kind, Found], apart, steps, made_of)
        proof.add(found)
        return returned

    if parts.runs:
        record = level("bodies", _RECORD, calls, run_bodies, parts.library, folded)
        made_of = digest(made_of, saved.digest("bodies"))  # has fixed the tokens of all calls
    if parts.library is not None:
        native = run_folded if folded else run_native
        level("native", None, calls, native, record, parts.library)
        users = level("users", _RECORDS, (1 + parts.exported) * calls, run_users)
    if parts.other is not None:
        level("against", None, calls, run_against, record, parts.other)
    if parts.engine is not None:
        played = level("engine", _RECORD, calls, run_engine, parts.engine)
    pieces = len(parts.pieces)
    if parts.engines is not None and parts.engine is not None:
        proven = level(
            "proof engines", _RECORD, pieces, run_proof_engines, parts.engines, parts.pieces, record
        )
    elif parts.engines is not None:
        level("proof engines", None, pieces, build_proof_engines, parts.engines, parts.pieces)
    if parts.referenced:
        references = level(
            "reference", _RECORD, calls, run_reference, record, users, played, proven
        )
    del record, users, played, proven
    if parts.exported and parts.floats:
        level("float", None, calls, run_float, parts.floats, references)


def _unrounded(lost: LeftOut) -> str:
    """A warning of roundings that the session of users leaves out."""
    return (
        "ONNX Runtime leaves out roundings of the file as users run it: "
        f"{lost.operators} of {lost.of} operators differ from the rounded graph by more than a last "
        f"rounding, most of all {lost.operator}, by {lost.error:.2g} (a rounding: {lost.rounding:.2g})."
    )


def _freed(work: Callable[..., T], *arguments: Any) -> T:
    """Run, then let go of the model it held (modules and their hooks refer to each other) and of
    what the heap keeps of it.
    """
    outputs = work(*arguments)
    gc.collect()
    with suppress(
        OSError, AttributeError
    ):  # glibc only; ONNX Runtime leaves 1.6 GB in the heap for a model of 135 M weights
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return outputs
