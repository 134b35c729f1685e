"""The calls that every runner of a proof gets, and the errors between runners at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calibration.progress import Progress
from exporter.proof.metrics import CompareTensors, TensorError
from exporter.proof.options import text_rows
from exporter.proof.runners import SessionRunner
from exporter.proof.scope import Scope

if TYPE_CHECKING:
    from exporter.run.sessions import DecoderSession

__all__ = [
    "NATIVE",
    "ONNX_RUNTIME",
    "TENSORRT",
    "TORCH",
    "Call",
    "Comparison",
    "Errors",
    "Found",
    "Outputs",
    "Pairs",
]

T = TypeVar("T")

# Names of the runners that several levels compare, as a report shows them.
ONNX_RUNTIME, NATIVE, TENSORRT, TORCH = "onnxruntime", "native", "tensorrt", "torch-fake-quant"
Errors = dict[tuple[str, str, str], TensorError]  # (comparison, phase, tensor) -> of all calls
Outputs = dict[str, np.ndarray]
Pairs = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Call:
    """One call into every runner."""

    phase: str
    feed: dict[str, np.ndarray]

    @property
    def valid(self) -> np.ndarray:
        """Which tokens [B, S] are none of padding."""
        tokens = self.feed["input_ids"].shape[1]
        return self.feed["attention_mask"][:, -tokens:] > 0


@dataclass(frozen=True)
class Found:
    """What a level adds to a comparison: its attributes' new entries."""

    calls: list[Call]
    errors: Errors
    notes: list[str]
    warnings: list[str]


class Comparison:
    """Keeps the calls that the first runner led, and what every level finds at them.

    Args:
        scope: what is judged.
        progress: advanced once a call of each runner.

    Attributes:
        calls: those that were made.
        errors: of every comparison.
        notes, warnings: of a ValidationResult.
    """

    def __init__(self, scope: Scope, progress: Progress) -> None:
        self.scope, self.progress = scope, progress
        self.calls: list[Call] = []
        self.errors: Errors = {}
        self.notes: list[str] = scope.notes()
        self.warnings: list[str] = []

    def apart(self, work: Callable[..., T], *arguments: Any) -> tuple[T, Found]:
        """What `work` returns of a comparison of the same calls, and what it found, to be added."""
        other = copy(self)
        other.calls, other.errors, other.notes, other.warnings = [*self.calls], {}, [], []
        returned = work(other, *arguments)
        calls = other.calls[len(self.calls) :]
        return returned, Found(calls, other.errors, other.notes, other.warnings)

    def add(self, found: Found) -> None:
        """Add what a level found."""
        self.calls += found.calls
        self.errors |= found.errors
        self.notes += found.notes
        self.warnings += found.warnings

    def feeds(self, leader: SessionRunner) -> Iterator[dict[str, np.ndarray]]:
        """Prefill, greedy decode steps that follow the leader, a batch of two with padding on the
        left, and a step on that.
        """
        scope = self.scope
        # of real text; a short one is repeated, as calibration takes it too
        windows = text_rows(scope.quant, scope.options, 3, scope.tokens)
        plans = [
            (
                "prefill",
                "decode",
                windows[:1],
                np.ones((1, scope.tokens), np.int64),
                scope.steps,
            )
        ]
        width = scope.padded
        mask = np.ones((2, width), np.int64)
        if not scope.unpadded:
            mask[0, : width // 4] = 0
        plans.append(("padded batch", "padded batch", windows[1:, :width], mask, 1))
        for first, then, ids, mask, steps in plans:
            for step in range(steps + 1):
                self.calls.append(
                    Call(then if step else first, {"input_ids": ids, "attention_mask": mask})
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
                    key = (comparison, call.phase, tensor)
                    self.errors[key] = self.errors[key] + error if key in self.errors else error
            self.progress.advance(note=call.phase)

    def stepped(
        self, session: DecoderSession, calls: Sequence[Call] | None = None
    ) -> Iterator[Outputs]:
        """What a session gives at each of the recorded calls, or some of them."""
        for call in self.calls if calls is None else calls:
            ids, mask = call.feed["input_ids"], call.feed["attention_mask"]
            if ids.shape == mask.shape:
                session.reset()
            yield session.step(ids, mask)
            self.progress.advance(note=call.phase)

    def replayed(self) -> list[dict[str, np.ndarray]]:
        """The calls that ONNX Runtime got."""
        return [call.feed for call in self.calls]
