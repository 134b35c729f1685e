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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calibration.out.description import read_description
from calibration.out.folder import open_stage, stages_in
from calibration.out.layout import DESCRIPTION, ENGINE, ENGINE_FILE, ONNX, QUANT, REPORT
from calibration.progress import NullProgress, Progress
from calibration.quant.scheme import FLOAT_BITS
from exporter.engine.build import EngineOptions
from exporter.engine.edition import captured_log
from exporter.graph.names import WRITE_INDICES, is_routed, layer_of, layer_output, new_key
from exporter.proof.basis import RotatedRunner, recorded_rotation, turned
from exporter.proof.diagnose import causes
from exporter.proof.engine import ProofEngines
from exporter.proof.judge import (
    AS_RUN,
    INNER,
    PROOF_ENGINE,
    LayerReport,
    LeftOut,
    Stack,
    first_failure,
    judge,
    left_out,
)
from exporter.proof.memory import check_memory
from exporter.proof.metrics import CompareTensors, TensorError, total_error
from exporter.proof.pieces import (
    FoldedSession,
    OnnxPiece,
    Piece,
    PieceSession,
    cut,
    pieces,
    run_pieces,
)
from exporter.proof.runners import (
    LedRunner,
    LockstepRunner,
    ReplayRunner,
    SessionRunner,
    gemm_nodes,
)
from exporter.proof.weights import compare_weights, compared_tensors
from exporter.run import find_runner
from exporter.run.native import NativeSession, native_library
from exporter.run.onnxruntime import OnnxSession, load_model
from exporter.run.reference import TorchSession
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel
    from exporter.proof.runners import GemmNode
    from exporter.run.sessions import DecoderSession

__all__ = [
    "REFERENCE",
    "LayerReport",
    "ValidateOptions",
    "ValidationResult",
    "decoder_stack",
    "float_checkpoint",
    "max_context",
    "text_rows",
    "validate",
]

T = TypeVar("T")

# Names of the runners that are compared, as a report shows them.
ONNX_RUNTIME, NATIVE, TENSORRT = "onnxruntime", "native", "tensorrt"
USERS, SHOWN = "native, as users run it", "native, with inner tensors"
TORCH, LOCKSTEP, FLOAT = "torch-fake-quant", "torch-lockstep", "torch-float"
LOCKSTEP_USERS = "torch-lockstep, as users run it"
PROOF_ENGINES, LOCKSTEP_ENGINES = "tensorrt, with inner tensors", "torch-lockstep, TensorRT"
FUSED = "engine with inner tensors"  # against the one without
AGAINST = "against"
NO_FLOATS = "The float model does not fit into the memory"
REFERENCE = "torch"  # the runner whose model TORCH and LOCKSTEP are
_GIVEN = re.compile(r" at (\S+)(?: \(with \S+\))? given its inputs ")  # first_failure's words
# Tokens of a prefill whose length nobody gave, and at most; how many cross a window.
_PREFILL, _LONGEST, _BEYOND = 64, 1024, 8
_PIECE = 1 << 30  # bytes of weights in a proof engine
_PADDED = 16  # tokens of the padded batch
_TOKENIZED = 100_000  # characters on which two tokenizers are compared
_SIZES = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size")
Errors = dict[
    tuple[str, str, str], list[TensorError]
]  # (comparison, phase, tensor) -> one per call
Outputs = dict[str, np.ndarray]
Pairs = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ValidateOptions:
    """What is run.

    Attributes:
        calib: text file or dataset; None is the text shipped with the project.
        option: the command line's name of the text, for messages.
        offline: never use the network.
        model: the float model that was quantised; without it neither the weights nor the
            quantisation error are checked.
        tokens: length of the prefill; with the steps cut to the context. None: _PREFILL, or as many
            as cross the smallest attention window, at most _LONGEST.
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


@dataclass(frozen=True)
class ValidationResult:
    """What was measured.

    Attributes:
        rows: one per level, phase and layer, then the logits.
        first_failure: where the first error above its limit is, or "".
        notes: what could not be run, and why.
        warnings: what a user ought to know of an export that is within tolerance.
        facts: text, tokens, seconds, and what of a failed layer differs from quant/ in the ONNX file.
    """

    rows: tuple[LayerReport, ...]
    first_failure: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything is within tolerance."""
        return not self.first_failure

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return {
            "ok": self.ok,
            "first_failure": self.first_failure,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            **self.facts,
            "rows": rows,
        }


@dataclass(frozen=True)
class _Call:
    """One call into every runner; false in `valid` is padding."""

    phase: str
    feed: dict[str, np.ndarray]

    @property
    def valid(self) -> np.ndarray:
        tokens = self.feed["input_ids"].shape[1]
        return self.feed["attention_mask"][:, -tokens:] > 0


class _Validator:
    def __init__(self, out: Path, options: ValidateOptions, progress: Progress) -> None:
        from calibration.quant.folder import read_quant

        self.out, self.options, self.progress = out, options, progress
        self.quant: QuantModel = read_quant(out / QUANT)
        model = load_model(out / ONNX)
        self.context = max_context(out, self.quant)
        self.room = min(self.context, max_context(options.against or out, self.quant))
        self.steps = max(min(options.steps, self.room - 2), 0)
        self.tokens = min(options.tokens or self._prefill(), self.room - self.steps)
        self.nodes = gemm_nodes(model, self.quant.decoder)
        self.layers = self._layers()
        wanted = {*self.layers, *([None] if self.layers.stop == self.quant.layers else [])}
        self.judged = [node for node in self.nodes if layer_of(node.name) in wanted]
        inner = [name for node in self.judged for name in (node.source, node.result)]
        keys = map(new_key, self.layers if self.quant.scheme.kv_bits < FLOAT_BITS else ())
        before = range(max(self.layers.start - 1, 0), self.layers.stop)  # what the first one reads
        self.marked = list(dict.fromkeys([*inner, *map(layer_output, before), *keys]))
        # An output of the graph, and what only standard ops made so far, are left to the runner.
        self.typed = {value.name for value in model.graph.value_info}
        # In a static cache padding comes last, and an expert's rows stand in another order.
        static = any(value.name == WRITE_INDICES for value in model.graph.input)
        self.unpadded = static and bool(self.quant.decoder.routers)
        self.errors: Errors = {}
        self.calls: list[_Call] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def _spans(self) -> list[int]:
        """The windows of the attentions that do not see every token of the context."""
        spans = {block.attend.window for block in self.quant.decoder.blocks}
        return sorted(span for span in spans if span is not None and span < self.context)

    def _prefill(self) -> int:
        """Tokens of which the last ones no longer see the first, if that can be afforded."""
        longest = max([_PREFILL, *(span + _BEYOND for span in self._spans()[:1])])
        return longest if longest <= _LONGEST else _PREFILL

    def note_windows(self) -> None:
        """Say which windows no token of the proof leaves."""
        reached = self.tokens + self.steps
        self.notes += [
            f"The attention window of {span} tokens was not reached by the {reached} that were run, "
            f"so nothing beyond it was proven; --tokens {span + _BEYOND} reaches it."
            for span in self._spans()
            if span >= reached
        ]

    def note_experts(self) -> None:
        """Say how the choice of experts is judged, and what is left out."""
        if self.quant.decoder.routers:
            self.notes.append(
                "The scores of experts are compared as every operator is, given its inputs. Accumulated "
                "errors are those of the experts that ONNX Runtime chose; against the float model, an "
                "engine and the session as users run it, which choose their own, they are shown and not "
                "judged. Of that session the loss is judged, and the operators where the torch reference "
                "takes part."
            )
        if self.unpadded:
            self.notes.append(
                "The padded batch was run without padding: a static cache puts it behind the tokens, "
                "so that the rows of an expert stand in another order."
            )

    def _layers(self) -> range:
        """The decoder layers to be judged."""
        first, end = self.options.layers or (0, self.quant.layers)
        if not 0 <= first < end <= self.quant.layers:
            raise InputError(
                "--layers",
                f"got {first}:{end}, expected A:B with 0 <= A < B <= {self.quant.layers}, the "
                "number of decoder layers",
                "Give such numbers; B itself is left out",
            )
        return range(first, end)

    def windows(self) -> np.ndarray:
        """Three windows of real text, int64 [3, tokens]; a short text is repeated, as calibration
        takes it too.
        """
        return text_rows(self.quant, self.options, 3, self.tokens)

    def feeds(self, leader: SessionRunner) -> Iterator[dict[str, np.ndarray]]:
        """Prefill, greedy decode steps that follow the leader, a batch of two with padding on the
        left, and a step on that.
        """
        windows = self.windows()
        plans = [
            (
                "prefill",
                "decode",
                windows[:1],
                np.ones((1, self.tokens), np.int64),
                self.steps,
            )
        ]
        width = min(self.tokens, _PADDED, self.room - 1)
        mask = np.ones((2, width), np.int64)
        if not self.unpadded:
            mask[0, : width // 4] = 0
        plans.append(("padded batch", "padded batch", windows[1:, :width], mask, 1))
        for first, then, ids, mask, steps in plans:
            for step in range(steps + 1):
                self.calls.append(
                    _Call(then if step else first, {"input_ids": ids, "attention_mask": mask})
                )
                yield self.calls[-1].feed
                ids = leader.outputs["logits"][:, -1:].argmax(-1)
                mask = np.concatenate([mask, np.ones_like(ids)], 1)

    def compare(self, runners: Sequence[Any], pairs: Pairs, each: Callable[[], None]) -> None:
        """Run every recorded call and add the errors to self.errors.

        Args:
            runners: Polygraphy's, in the order in which they run at each call.
            pairs: {comparison: (the reference's place among them, the compared one's)}.
            each: called after each call, while its outputs are there.
        """
        from polygraphy.comparator import Comparator

        stream = Comparator.run(runners, self.replayed(), streaming=True)
        for call, results in zip(self.calls, stream, strict=True):
            each()
            found = Comparator.compare_accuracy(
                results, comparisons=list(pairs.values()), compare_func=CompareTensors(call.valid)
            )[0]
            for comparison, (reference, compared) in pairs.items():
                names = runners[reference].name, runners[compared].name
                for tensor, error in found[names][0].items():
                    self.errors.setdefault((comparison, call.phase, tensor), []).append(error)
            self.progress.advance(note=call.phase)

    def run_onnx(self, library: Path | None) -> list[Outputs]:
        """What ONNX Runtime computes at each call, by the function bodies; where they do not all fit into
        the memory by native kernels, or without them layer by layer. Its own next tokens lead the
        decode steps.
        """
        from polygraphy.comparator import Comparator

        def open_session() -> DecoderSession:
            folder, dtype = self.out / ONNX, self.quant.scheme.dtype
            if self.folded and library is None:
                layers = self.quant.layers
                return FoldedSession(folder, self.context, self.marked, dtype, layers)
            kernels = library if self.folded else None
            return OnnxSession(folder, self.context, self.marked, dtype, kernels=kernels)

        leader = SessionRunner(ONNX_RUNTIME, open_session)
        record: list[Outputs] = []
        for _ in Comparator.run([leader], self.feeds(leader), streaming=True):
            record.append(dict(leader.outputs))
            self.progress.advance(note=f"{ONNX_RUNTIME}, {self.calls[-1].phase}")
        return record

    def run_native(self, record: list[Outputs], library: Path) -> None:
        """The native kernels in ONNX Runtime against the function bodies, each operator on the
        bodies' tensors, from what the first judged layer reads on.
        """
        given = [name for name in self.marked if name in self.typed]

        def open_session() -> OnnxSession:
            return OnnxSession(
                self.out / ONNX,
                self.context,
                self.marked,
                self.quant.scheme.dtype,
                kernels=library,
                given=given,
            )

        bodies = ReplayRunner(ONNX_RUNTIME, record)
        runners = [bodies, LedRunner(NATIVE, open_session, bodies)]
        self.compare(runners, {NATIVE: (0, 1)}, each=lambda: None)

    def run_folded(self, record: list[Outputs], library: Path) -> None:
        """The function bodies, one decoder layer after the other, against the native kernels that made
        the record, each operator on the kernels' tensors.
        """
        folder, dtype = self.out / ONNX, self.quant.scheme.dtype
        given = [name for name in self.marked if name in self.typed]
        model, layers = load_model(folder), self.quant.layers
        last = self.layers.stop == layers
        found = [
            cut(model, index, index + 1, layers, self.marked, given)
            for index in range(self.layers.start, layers + 1 if last else self.layers.stop)
        ]

        @contextmanager
        def opened(piece: Piece) -> Iterator[PieceSession]:
            yield PieceSession(piece, OnnxPiece(piece, folder), self.context, dtype)

        calls = [(call.feed["input_ids"], call.feed["attention_mask"]) for call in self.calls]
        bodies = run_pieces(found, calls, opened, record, led=True)
        runners = [ReplayRunner(ONNX_RUNTIME, bodies), ReplayRunner(NATIVE, record)]
        self.compare(runners, {NATIVE: (0, 1)}, each=lambda: None)

    def run_users(self) -> tuple[list[Outputs], list[Outputs]]:
        """Logits and cache of the session that users open at each call; and all that runs through it
        where that is shown, with a warning where showing changes what ONNX Runtime computes.
        """
        folder, dtype = self.out / ONNX, self.quant.scheme.dtype
        with NativeSession(folder, self.context, dtype, ()) as session:
            plain = list(self.stepped(session))
        if not self.options.wants(REFERENCE):
            return plain, []
        with NativeSession(folder, self.context, dtype, self.marked) as session:
            shown = list(self.stepped(session))
        changed = sum(
            not np.array_equal(one["logits"], other["logits"])
            for one, other in zip(plain, shown, strict=True)
        )
        if changed:
            self.warnings.append(
                f"Where inner tensors are outputs too, ONNX Runtime computes other logits of the file "
                f"in {changed} of {len(plain)} calls. Judged as run are the logits and the cache of the "
                "file as users run it, and the operators of the file whose inner tensors are shown."
            )
        return plain, shown

    def stepped(
        self, session: DecoderSession, calls: Sequence[_Call] | None = None
    ) -> Iterator[Outputs]:
        """What a session gives at each of the recorded calls, or some of them."""
        for call in self.calls if calls is None else calls:
            ids, mask = call.feed["input_ids"], call.feed["attention_mask"]
            if ids.shape == mask.shape:
                session.reset()
            yield session.step(ids, mask)
            self.progress.advance(note=call.phase)

    def native_kernels(self) -> Path | None:
        """The library of native kernels; None, with a note, where there is none.

        Raises:
            InputError: there is none, and the runner was asked for.
        """
        if not self.options.wants(NATIVE):
            return None
        library = native_library(self.progress.message)
        if self.options.asks_for(NATIVE) and not isinstance(library, Path):
            raise library
        if isinstance(library, Path):
            return library
        self.notes.append(
            f"The native CPU kernels could not be built, so they were not run. {library}"
        )
        return None

    def run_export(
        self,
        record: list[Outputs],
        users: tuple[list[Outputs], list[Outputs]],
        engine: list[Outputs],
        proven: list[Outputs],
    ) -> list[Outputs]:
        """ONNX Runtime against the fake-quantised torch model; what the session of users, the engine
        and the proof engines gave, where they were run, against ONNX Runtime. Returns the torch model's
        logits and layers' outputs.
        """
        onnx = ReplayRunner(ONNX_RUNTIME, record)
        runners: list[Any] = [onnx]
        pairs: Pairs = {}
        torch: SessionRunner | LockstepRunner | None = None
        if self.options.wants(REFERENCE) or proven:
            from calibration.reference.model import quantised_model

            model = quantised_model(self.quant, max_context=self.context)
        if self.options.wants(REFERENCE):
            torch = SessionRunner(TORCH, lambda: TorchSession(model))
            if self.quant.decoder.routers:
                torch = LockstepRunner(TORCH, model, onnx, self.nodes, routes=True)
            # the leader of the lockstep runs before it
            runners += [torch, LockstepRunner(LOCKSTEP, model, leader=onnx, nodes=self.nodes)]
            pairs |= {"export": (1, 0), INNER["export"]: (2, 0)}
        plain, shown = users
        if plain:
            pairs[AS_RUN] = (0, len(runners))
            runners.append(ReplayRunner(USERS, plain))
        if shown:
            leader = ReplayRunner(SHOWN, shown)
            pairs[INNER[AS_RUN]] = (len(runners) + 1, len(runners))
            runners += [leader, LockstepRunner(LOCKSTEP_USERS, model, leader, self.nodes)]
        if engine:
            pairs["kernel"] = (0, len(runners))
            runners.append(ReplayRunner(TENSORRT, engine))
        if proven:
            leader = ReplayRunner(PROOF_ENGINES, proven)
            lockstep = LockstepRunner(LOCKSTEP_ENGINES, model, leader, self.nodes)
            # Engines choose their experts themselves, so rows of one are those of other tokens.
            shared = [
                {name: array for name, array in outputs.items() if not is_routed(name)}
                for outputs in proven
            ]
            pairs[PROOF_ENGINE] = (0, len(runners) + 2)
            pairs[INNER[PROOF_ENGINE]] = (len(runners) + 1, len(runners))
            if engine:
                pairs[FUSED] = (len(runners) - 1, len(runners))
            runners += [leader, lockstep, ReplayRunner(f"{PROOF_ENGINES}, as a whole", shared)]
        wanted = ("logits", *map(layer_output, self.layers))
        kept: list[Outputs] = []

        def keep() -> None:
            if torch is not None:
                kept.append({name: torch.outputs[name] for name in wanted})

        self.compare(runners, pairs, keep)
        return kept

    def run_against(self, record: list[Outputs], other: QuantModel) -> None:
        """Another artifact's ONNX model against this one's, in this one's coordinates."""

        def open_session() -> DecoderSession:
            marked = [layer_output(index) for index in self.layers]
            return OnnxSession(other.path.parent / ONNX, self.room, marked)

        runners = [
            ReplayRunner(ONNX_RUNTIME, record),
            RotatedRunner(AGAINST, open_session, turned(self.quant, other)),
        ]
        self.compare(runners, {AGAINST: (0, 1)}, each=lambda: None)

    def other(self) -> QuantModel | None:
        """The artifact to compare with, if one was given.

        Raises:
            InputError: it has no quant folder, or another decoder.
        """
        from calibration.quant.folder import read_quant

        if self.options.against is None:
            return None
        other = read_quant(self.options.against / QUANT)
        for name in (*_SIZES, "max_position_embeddings"):
            if (got := other.config[name]) != (expected := self.quant.config[name]):
                raise InputError(
                    f"--against {self.options.against}",
                    f"got a model with {name} {got}, expected {expected} as in {self.out}",
                    "Give an artifact of the same float model",
                )
        return other

    def same_codes(self, other: QuantModel) -> bool:
        """Whether two artifacts hold the same numbers, so that they must compute the same; says so
        where they do not.
        """
        mine, theirs = (
            {name: digest for name, digest in quant.files.items() if name.endswith(".safetensors")}
            for quant in (self.quant, other)
        )
        if mine == theirs:
            return True
        self.notes.append(
            f"{self.options.against} holds other codes ({other.label}), so its differences are shown "
            "and not judged."
        )
        return False

    def run_float(self, checkpoint: Checkpoint, references: list[Outputs]) -> None:
        """The fake-quantised model's outputs against the float model on the same tokens."""
        from calibration.reference.model import FloatReference, float_model

        runners = [
            RotatedRunner(
                FLOAT,
                lambda: TorchSession(FloatReference(float_model(checkpoint, self.context))),
                recorded_rotation(self.quant),
            ),
            ReplayRunner(TORCH, references),
        ]
        self.compare(runners, {"quantisation": (0, 1)}, each=lambda: None)

    def replayed(self) -> list[dict[str, np.ndarray]]:
        """The calls that ONNX Runtime got."""
        return [call.feed for call in self.calls]

    def engine(self) -> Callable[[], DecoderSession] | None:
        """Opens the engine; None, with a note, where this export has no engine or it cannot run here.

        Raises:
            InputError: there is no engine, and the runner was asked for.
        """
        if not self.options.wants(TENSORRT):
            return None
        folder, tensorrt = self.out / ENGINE, find_runner(TENSORRT)
        asked = self.options.asks_for(TENSORRT)
        if not asked and ENGINE not in stages_in(self.out):
            stale = (
                f"; {folder} holds an earlier export's" if (folder / ENGINE_FILE).is_file() else ""
            )
            self.notes.append(f"No engine was built, so the CUDA kernels were not run{stale}.")
            return None
        why = f"--runner {TENSORRT}" if asked else "the validation"
        static = open_stage(self.out, ENGINE, why).description().cache.capacity is not None
        if tensorrt.unavailable():
            self.notes.append(
                "No GPU here: the engine was built but not run, so the CUDA kernels were not "
                "executed in this validation."
            )
            return None
        if static:
            self.notes.append(
                "The engine has a static cache, which the validation cannot run, so the CUDA kernels "
                "were not executed in it."
            )
            return None

        def open_session() -> DecoderSession:
            stage = open_stage(self.out, ENGINE, "the validation")
            return tensorrt.open(stage, tensorrt.describe(stage))

        return open_session

    def proof_engines(self) -> ProofEngines | None:
        """What builds engines with inner tensors as outputs, where TensorRT was asked for.

        Raises:
            InputError: the TensorRT that built the engine is not here.
        """
        if not self.options.asks_for(TENSORRT):
            return None
        stage = open_stage(self.out, ENGINE, f"--runner {TENSORRT}")
        longest = EngineOptions(max_batch=2, max_seq=self.tokens + self.steps)
        return ProofEngines(stage, self.out / ONNX, longest)

    def pieces(self) -> list[Piece]:
        """The judged layers of the graph, with the head behind the last one, in pieces."""
        last = self.layers.stop == self.quant.layers
        judged = range(self.layers.start, self.layers.stop + last)
        model = load_model(self.out / ONNX)
        return pieces(model, self.quant.layers, self.marked, _PIECE, judged)

    def build_proof_engines(self, engines: ProofEngines, found: list[Piece]) -> None:
        """Build them all, and say what was seen: nothing is run in them."""
        for piece in found:
            engines.check(piece)
            self.progress.advance(note=f"{PROOF_ENGINE}, layer {piece.first}")
        self.notes.append(
            f"TensorRT was half done: {engines.built} were built, and give what the graph says in its "
            "types; they were not run."
        )

    def run_proof_engines(
        self, engines: ProofEngines, found: list[Piece], record: list[Outputs]
    ) -> list[Outputs]:
        """What they compute at each call, all their tensors."""

        @contextmanager
        def opened(piece: Piece) -> Iterator[PieceSession]:
            with engines.runner(piece) as runner:
                yield PieceSession(piece, runner, self.context, self.quant.scheme.dtype)
            self.progress.advance(note=f"{PROOF_ENGINE}, layer {piece.first}")

        calls = [(call.feed["input_ids"], call.feed["attention_mask"]) for call in self.calls]
        outputs = run_pieces(found, calls, opened, record)
        self.notes.append(f"{engines.built} were built and run.")
        return outputs

    def run_engine(self, engine: Callable[[], DecoderSession]) -> list[Outputs]:
        """What the engine computes at each call; nothing at those of more sequences than it takes."""
        with engine() as session:
            most = getattr(session, "max_batch", None)
            record = [
                next(self.stepped(session, [call]))
                if most is None or len(call.feed["input_ids"]) <= most
                else {}
                for call in self.calls
            ]
        if not all(record):
            self.notes.append(
                f"The engine takes {most} sequence{'s' * (most != 1)} at once, so the padded batch was "
                "not run in it."
            )
        return record

    def compare_engines(self) -> None:
        """Say how near the logits of the proof engines are to those of the engine."""
        errors = [
            total_error(parts).relative
            for (comparison, _, tensor), parts in self.errors.items()
            if (comparison, tensor) == (FUSED, "logits")
        ]
        if largest := max(errors, default=0.0):
            self.warnings.append(
                f"With inner tensors as outputs TensorRT computes other logits, by {largest:.2g}: it "
                "fuses otherwise. The operators judged are those of engines that show them."
            )

    def checkpoint(self) -> Checkpoint | None:
        """The float model; None, with a note, where it cannot be had."""
        found = float_checkpoint(self.quant, self.options)
        if isinstance(found, str):
            self.notes.append(found)
            return None
        self.check_tokenizer(found)
        return found

    def check_tokenizer(self, checkpoint: Checkpoint) -> None:
        """Hold the tokenizer in quant/ against the float model's, on the proof's text.

        Raises:
            CheckError: it gives other tokens.
        """
        text = _text(self.options)[:_TOKENIZED]
        mine, theirs = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for tokenizer in (self.quant.tokenizer(), checkpoint.tokenizer())
        )
        if mine == theirs:
            return
        place = next(
            (
                place
                for place, pair in enumerate(zip(mine, theirs, strict=False))
                if len(set(pair)) > 1
            ),
            min(len(mine), len(theirs)),
        )
        got, expected = (
            f"token {tokens[place]}" if place < len(tokens) else "the end"
            for tokens in (mine, theirs)
        )
        raise CheckError(
            f"{self.out / QUANT}, tokenizer",
            f"got {got} at place {place} of the text, expected {expected} as the float model's "
            "tokenizer gives",
            "It is another model's: quantize the model again",
        )

    def run(self) -> ValidationResult:
        began = time.monotonic()
        self.note_windows()
        self.note_experts()
        self.folded, fits = check_memory(self.quant.decoder, self.quant.weights())
        checkpoint = self.checkpoint()
        floats = checkpoint if fits else None
        if checkpoint and not fits:
            self.notes.append(f"{NO_FLOATS}, so what quantizing cost was not measured.")
        calls = self.steps + 3
        library, engine, other = self.native_kernels(), self.engine(), self.other()
        exported = self.options.wants(REFERENCE)
        engines = self.proof_engines()
        found = self.pieces() if engines else []
        runs = [
            library,
            library,
            library and exported,
            other,
            engine,
            library or exported or engine,
            exported and floats,
        ]
        if not any(runs) and engines is None:
            raise InputError(
                "--runner",
                f"got {ONNX_RUNTIME} alone, expected another one to compare it with",
                f"Add {NATIVE}, {TENSORRT} or {REFERENCE}, separated by commas",
            )
        weights = compared_tensors(checkpoint, self.quant, self.layers) if checkpoint else 0
        runs = [True, *runs] if any(runs) else runs  # ONNX Runtime leads
        self.progress.start(REPORT, weights + len(found) + calls * sum(map(bool, runs)))
        rows = (
            compare_weights(checkpoint, self.quant, self.progress, self.layers)
            if checkpoint
            else []
        )
        with captured_log():
            record, users = list[Outputs](), (list[Outputs](), list[Outputs]())
            played, proven = list[Outputs](), list[Outputs]()
            if any(runs):
                record = _freed(self.run_onnx, library)
            if library is not None:
                _freed(self.run_folded if self.folded else self.run_native, record, library)
                users = _freed(self.run_users)
            if other is not None:
                _freed(self.run_against, record, other)
            if engine is not None:
                played = _freed(self.run_engine, engine)
            if engines is not None and engine is not None:
                proven = _freed(self.run_proof_engines, engines, found, record)
            elif engines is not None:
                self.build_proof_engines(engines, found)
            references = list[Outputs]()
            if exported or engine or library:
                references = _freed(self.run_export, record, users, played, proven)
            del record, users, played, proven
            if exported and floats:
                self.run_float(floats, references)
        self.progress.finish()
        self.compare_engines()
        only = self.layers if self.options.layers else None
        stack = decoder_stack(self.quant, self.nodes, only)
        rows += judge(self.errors, stack)
        if other is not None and not self.same_codes(other):
            rows = [replace(row, limit=None) if row.level == AGAINST else row for row in rows]
        facts = {
            "tokens": self.tokens,
            "steps": self.steps,
            "text": self.options.text_name,
            "seconds": round(time.monotonic() - began, 2),
        }
        if (lost := left_out(self.errors, stack)).operators:
            facts["left_out"] = asdict(lost)
            self.warnings.append(_unrounded(lost))
        failure = first_failure(self.errors, rows, stack)
        if operator := _GIVEN.search(failure):
            layer = next(layer_of(row.tensor) for row in rows if not row.ok)
            facts["causes"] = causes(self.quant, self.out / ONNX, layer, operator[1])
        return ValidationResult(
            tuple(rows), failure, tuple(self.notes), tuple(self.warnings), facts
        )


def _unrounded(lost: LeftOut) -> str:
    """A warning of roundings that the session of users leaves out."""
    return (
        "ONNX Runtime leaves out roundings of the file as users run it: "
        f"{lost.operators} of {lost.of} operators differ from the rounded graph by more than a last "
        f"rounding, most of all {lost.operator}, by {lost.error:.2g} (a rounding: {lost.rounding:.2g})."
    )


def decoder_stack(quant: QuantModel, nodes: list[GemmNode], only: range | None = None) -> Stack:
    """What judges a quantized model: its nodes, and how each is quantized."""
    others = {
        node: scheme
        for node in quant.decoder.nodes
        if (scheme := quant.scheme_of(node)) != quant.scheme
    }
    return Stack(quant.decoder, nodes, quant.scheme, others, only)


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

    found = text_tokens(quant.tokenizer(), _text(options), quant.decoder.vocab, options.option)
    return np.resize(found, (rows, tokens))


def _text(options: ValidateOptions) -> str:
    from calibration.data import load_text

    return load_text(options.calib, options.offline, strict=False, where=options.option)


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


def validate(
    out: Path, options: ValidateOptions | None = None, progress: Progress | None = None
) -> ValidationResult:
    """Compare an artefact folder's ONNX model (and engine) with the torch references on real text.

    Args:
        out: OUT with quant/ and onnx/; engine/ takes part where there is a GPU.

    Raises:
        InputError: a stage is missing or damaged, the text is too short, or the memory does not
            suffice. CheckError: a node is missing, or the tokenizer is another model's.
    """
    return _Validator(Path(out), options or ValidateOptions(), progress or NullProgress()).run()
