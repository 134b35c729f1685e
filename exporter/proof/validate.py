"""Proves an export level by level: weights in quant/, ONNX Runtime, the TensorRT engine on a GPU,
and the cost of quantising.

What runs where:
- weights: every tensor in quant/ against the float model's, without running a model
  (weights.py).
- export: ONNX Runtime against the fake-quantised torch reference. ONNX Runtime runs the graph after
  round_every_op, which casts explicitly around standard ops, because its CPU
  provider has few 16-bit kernels. The file as it is runs in tests/exporter/graph/test_graph.py, in
  fp32.
- native: the same graph with the native CPU kernels in place of the function bodies, which must give
  the same bits at every node (A16 and attention: within rounding; what follows attention is given
  the body's).
- kernel: the TensorRT engine, which is built from the file as it is, against ONNX Runtime. An
  engine shows no inner tensors, so only logits and the new tokens of the present KV cache are
  compared, with the limits for accumulated errors.
- quantisation: the fake-quantised reference against the float model.

One model is in memory at a time: ONNX Runtime's outputs are recorded and replayed beside the torch
reference.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calibration.out.description import read_description
from calibration.out.folder import open_stage, stages_in
from calibration.out.layout import DESCRIPTION, ENGINE, ENGINE_FILE, ONNX, QUANT, REPORT
from calibration.progress import NullProgress, Progress
from calibration.quant.scheme import FLOAT_BITS
from exporter.engine.edition import captured_log
from exporter.graph.names import layer_output, new_key
from exporter.proof.basis import RotatedRunner, recorded_rotation
from exporter.proof.judge import LayerReport, Stack, first_failure, judge
from exporter.proof.memory import check_memory
from exporter.proof.metrics import CompareTensors, TensorError
from exporter.proof.runners import (
    LedRunner,
    LockstepRunner,
    ReplayRunner,
    SessionRunner,
    gemm_nodes,
)
from exporter.proof.weights import compare_weights, compared_tensors
from exporter.run import find_runner
from exporter.run.native import native_library
from exporter.run.onnxruntime import OnnxSession, load_model
from exporter.run.reference import TorchSession
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel
    from exporter.run.sessions import DecoderSession

__all__ = ["LayerReport", "ValidateOptions", "ValidationResult", "validate"]

T = TypeVar("T")

# Names of the runners that are compared, as a report shows them.
ONNX_RUNTIME, NATIVE, TENSORRT = "onnxruntime", "native", "tensorrt"
TORCH, LOCKSTEP, FLOAT = "torch-fake-quant", "torch-lockstep", "torch-float"
_PADDED = 16  # tokens of the padded batch
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
        offline: never use the network.
        model: the float model that was quantised; without it neither the weights nor the
            quantisation error are checked.
        tokens: length of the prefill; with the steps cut to the context.
        steps: greedy decode steps.
    """

    calib: str | None = None
    offline: bool = True
    model: str | None = None
    tokens: int = 64
    steps: int = 8


@dataclass(frozen=True)
class ValidationResult:
    """What was measured.

    Attributes:
        rows: one per level, phase and layer, then the logits.
        first_failure: where the first error above its limit is, or "".
        notes: what could not be run, and why.
        facts: runners, tokens, seconds.
    """

    rows: tuple[LayerReport, ...]
    first_failure: str
    notes: tuple[str, ...]
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
        self.context = self._max_context()
        self.steps = max(min(options.steps, self.context - 2), 0)
        self.tokens = min(options.tokens, self.context - self.steps)
        self.nodes = gemm_nodes(model, self.quant.decoder)
        inner = [name for node in self.nodes for name in (node.source, node.result)]
        keys = map(
            new_key, range(self.quant.layers if self.quant.scheme.kv_bits < FLOAT_BITS else 0)
        )
        self.marked = list(
            dict.fromkeys([*inner, *map(layer_output, range(self.quant.layers)), *keys])
        )
        self.errors: Errors = {}
        self.calls: list[_Call] = []
        self.notes: list[str] = []

    def _max_context(self) -> int:
        """What model.json says; a graph that was written without one goes as far as the model."""
        path = self.out / ONNX / DESCRIPTION
        if path.is_file():
            return read_description(path, "Export the model again")[0].max_context
        return int(self.quant.config["max_position_embeddings"])

    def windows(self) -> np.ndarray:
        """Three windows of real text, int64 [3, tokens]; a short text is repeated, as calibration
        takes it too.
        """
        from calibration.data import load_text, text_tokens

        text = load_text(self.options.calib, self.options.offline, strict=False)
        tokens = text_tokens(self.quant.tokenizer(), text, self.quant.decoder.vocab, "--calib")
        return np.resize(tokens, (3, self.tokens))

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
        width = min(self.tokens, _PADDED, self.context - 1)
        mask = np.ones((2, width), np.int64)
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

    def run_onnx(self) -> list[Outputs]:
        """What ONNX Runtime computes at each call; its own next tokens lead the decode steps."""
        from polygraphy.comparator import Comparator

        def open_session() -> DecoderSession:
            dtype = self.quant.scheme.dtype
            return OnnxSession(self.out / ONNX, self.context, self.marked, dtype)

        leader = SessionRunner(ONNX_RUNTIME, open_session)
        record: list[Outputs] = []
        for _ in Comparator.run([leader], self.feeds(leader), streaming=True):
            record.append(dict(leader.outputs))
            self.progress.advance(note=f"{ONNX_RUNTIME}, {self.calls[-1].phase}")
        return record

    def run_native(self, record: list[Outputs], library: Path) -> None:
        """The native kernels in ONNX Runtime against the function bodies; what follows attention,
        which is float, goes on with the body's.
        """
        given = [node.source for node in self.nodes if node.site.attention]

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

    def native_kernels(self) -> Path | None:
        """The library of native kernels; None, with a note, where there is none."""
        library = native_library()
        if isinstance(library, Path):
            return library
        self.notes.append(
            f"The native CPU kernels could not be built, so they were not run. {library}"
        )
        return None

    def run_export(self, record: list[Outputs]) -> list[Outputs]:
        """ONNX Runtime and, if there is one, the engine against the fake-quantised torch model;
        returns the latter's logits and layers' outputs.
        """
        from calibration.reference.model import quantised_model

        model = quantised_model(self.quant, max_context=self.context)

        def open_session() -> TorchSession:
            return TorchSession(model)

        onnx, torch = ReplayRunner(ONNX_RUNTIME, record), SessionRunner(TORCH, open_session)
        lockstep = LockstepRunner(LOCKSTEP, model, leader=onnx, nodes=self.nodes)
        runners = [onnx, torch, lockstep]  # the leader of the lockstep runs before it
        pairs: Pairs = {"export": (1, 0), "operator": (2, 0)}
        if engine := self.engine_runner():
            runners.append(engine)
            pairs["kernel"] = (0, 3)
        wanted = ("logits", *map(layer_output, range(self.quant.layers)))
        kept: list[Outputs] = []
        self.compare(
            runners, pairs, lambda: kept.append({name: torch.outputs[name] for name in wanted})
        )
        return kept

    def run_float(self, checkpoint: Checkpoint, references: list[Outputs]) -> None:
        """The fake-quantised model's outputs against the float model on the same tokens."""
        from calibration.reference.model import FloatReference, float_model

        runners = [
            RotatedRunner(
                FLOAT,
                lambda: TorchSession(FloatReference(float_model(checkpoint))),
                recorded_rotation(self.quant),
            ),
            ReplayRunner(TORCH, references),
        ]
        self.compare(runners, {"quantisation": (0, 1)}, each=lambda: None)

    def replayed(self) -> list[dict[str, np.ndarray]]:
        """The calls that ONNX Runtime got."""
        return [call.feed for call in self.calls]

    def engine_runner(self) -> SessionRunner | None:
        """The engine's runner; None, with a note, where this export has no engine or there is no
        GPU.
        """
        folder, tensorrt = self.out / ENGINE, find_runner(TENSORRT)
        if ENGINE not in stages_in(self.out):
            stale = (
                f"; {folder} holds an earlier export's" if (folder / ENGINE_FILE).is_file() else ""
            )
            self.notes.append(f"No engine was built, so the CUDA kernels were not run{stale}.")
        elif tensorrt.unavailable():
            self.notes.append(
                "No GPU here: the engine was built but not run, so the CUDA kernels were not "
                "executed in this validation."
            )
        elif open_stage(self.out, ENGINE, "the validation").description().cache.capacity:
            self.notes.append(
                "The engine has a static cache, which the validation cannot run, so the CUDA kernels "
                "were not executed in it."
            )
        else:

            def open_session() -> DecoderSession:
                stage = open_stage(self.out, ENGINE, "the validation")
                return tensorrt.open(stage, tensorrt.describe(stage))

            return SessionRunner(TENSORRT, open_session)
        return None

    def checkpoint(self) -> Checkpoint | None:
        """The float model; None, with a note, where it cannot be had."""
        from calibration.checkpoints.checkpoint import open_checkpoint

        lost = "neither the weights nor the quantisation error were checked"
        if self.options.model is None:
            self.notes.append(f"No float model was given, so {lost}.")
            return None
        try:
            checkpoint = open_checkpoint(self.options.model, self.options.offline)
        except InputError as error:
            self.notes.append(f"The float model could not be opened, so {lost}. {error}")
            return None
        if checkpoint.fingerprint == self.quant.source["fingerprint"]:
            return checkpoint
        self.notes.append(
            f"The float model at {checkpoint.source.path} is not the one that was quantised, so {lost}."
        )
        return None

    def run(self) -> ValidationResult:
        began = time.monotonic()
        sizes = self.quant.sizes
        check_memory(int(sizes["linear_weights"]), self.quant.weights())
        checkpoint = self.checkpoint()
        calls = self.steps + 3
        weights = compared_tensors(checkpoint) if checkpoint else 0
        library = self.native_kernels()
        runs = 2 + (library is not None) + (checkpoint is not None)
        self.progress.start(REPORT, weights + calls * runs)
        rows = compare_weights(checkpoint, self.quant, self.progress) if checkpoint else []
        with captured_log():
            record = _freed(self.run_onnx)
            if library is not None:
                _freed(self.run_native, record, library)
            references = _freed(self.run_export, record)
            del record
            if checkpoint:
                self.run_float(checkpoint, references)
        self.progress.finish()
        stack = Stack(self.quant.decoder, self.nodes, self.quant.scheme, self.quant.exceptions)
        rows += judge(self.errors, stack)
        facts = {
            "tokens": self.tokens,
            "steps": self.steps,
            "text": self.options.calib or "the project's default text",
            "seconds": round(time.monotonic() - began, 2),
        }
        return ValidationResult(
            tuple(rows), first_failure(self.errors, rows, stack), tuple(self.notes), facts
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


def validate(
    out: Path, options: ValidateOptions | None = None, progress: Progress | None = None
) -> ValidationResult:
    """Compare an artefact folder's ONNX model (and engine) with the torch references on real text.

    Args:
        out: OUT with quant/ and onnx/; engine/ takes part where there is a GPU.

    Raises:
        InputError: a stage is missing or damaged, the text is too short, or the memory does not
            suffice.
    """
    return _Validator(Path(out), options or ValidateOptions(), progress or NullProgress()).run()
