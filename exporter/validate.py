"""Proves an export layer by layer: float torch, fake-quantised torch, ONNX Runtime and, on a GPU, the TensorRT engine."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.progress import NullProgress, Progress
from exporter.edition import ENGINE_FILE, captured_log, gpu_capabilities
from exporter.engine_session import TensorrtSession
from exporter.graph import layer_output
from exporter.onnx_runner import load_model
from exporter.sessions import OnnxSession, TorchSession
from exporter.validate_judge import LayerReport, Stack, first_failure, judge
from exporter.validate_metrics import CompareTensors, TensorError
from exporter.validate_runners import LockstepRunner, SessionRunner, gemm_nodes
from plugins.core.errors import InputError

if TYPE_CHECKING:
    from calibration.quant_folder import QuantModel
    from exporter.sessions import DecoderSession

__all__ = ["LayerReport", "ValidateOptions", "ValidationResult", "validate"]

ONNX, TORCH, LOCKSTEP, FLOAT, ENGINE = "onnxruntime", "torch-fake-quant", "torch-lockstep", "torch-float", "tensorrt"
_PADDED = 16  # tokens of the padded batch
Errors = dict[tuple[str, str, str], list[TensorError]]  # (comparison, phase, tensor) -> one per call


@dataclass(frozen=True)
class ValidateOptions:
    """What is run.

    Attributes:
        calib: text file or dataset; None is the text shipped with the project.
        offline: never use the network.
        model: the float model; None is the one named in OUT/manifest.json.
        tokens: length of the prefill, cut to the model's context.
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
        return {"ok": self.ok, "first_failure": self.first_failure, "notes": list(self.notes), **self.facts, "rows": rows}


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
        from calibration.quant_folder import read_quant
        from calibration.quantize import STAGE

        self.out, self.options, self.progress = out, options, progress
        self.quant: QuantModel = read_quant(out / STAGE)
        context = int(self.quant.config["max_position_embeddings"])
        self.tokens = max(min(options.tokens, context - options.steps), 2)
        self.nodes = gemm_nodes(load_model(out / "onnx"), self.quant.family, self.quant.layers)
        inner = [name for node in self.nodes for name in (node.source, node.result)]
        self.marked = list(dict.fromkeys([*inner, *map(layer_output, range(self.quant.layers))]))
        self.errors: Errors = {}
        self.calls: list[_Call] = []
        self.notes: list[str] = []

    def windows(self) -> np.ndarray:
        """Three windows of real text, [3, tokens]."""
        from calibration.data import load_text, tokens_from_text

        text = load_text(self.options.calib, self.options.offline)
        return tokens_from_text(self.quant.tokenizer(), text, 3, self.tokens)

    def feeds(self, leader: SessionRunner) -> Iterator[dict[str, np.ndarray]]:
        """Prefill, greedy decode steps that follow the leader, a batch of two with padding on the left, and a step on that."""
        windows = self.windows()
        plans = [("prefill", "decode", windows[:1], np.ones((1, self.tokens), np.int64), self.options.steps)]
        width = min(self.tokens, _PADDED)
        mask = np.ones((2, width), np.int64)
        mask[0, : width // 4] = 0
        plans.append(("padded batch", "padded batch", windows[1:, :width], mask, 1))
        for first, then, ids, mask, steps in plans:
            for step in range(steps + 1):
                self.calls.append(_Call(then if step else first, {"input_ids": ids, "attention_mask": mask}))
                yield self.calls[-1].feed
                ids = leader.outputs["logits"][:, -1:].argmax(-1)
                mask = np.concatenate([mask, np.ones_like(ids)], 1)

    def compare(self, stream: Any, pairs: dict[str, tuple[int, int]]) -> None:
        """Add a Polygraphy stream's errors to self.errors; pairs: {comparison: (reference, runner) by position}."""
        from polygraphy.comparator import Comparator

        for number, results in enumerate(stream):
            call = self.calls[number]
            found = Comparator.compare_accuracy(results, comparisons=list(pairs.values()), compare_func=CompareTensors(call.valid))[0]
            names = [name for name, _ in results]
            for comparison, (reference, runner) in pairs.items():
                for tensor, error in found[names[reference], names[runner]][0].items():
                    self.errors.setdefault((comparison, call.phase, tensor), []).append(error)
            self.progress.advance(note=call.phase)

    def run_export(self) -> list[dict[str, np.ndarray]]:
        """ONNX Runtime and, if there is one, the engine against the fake-quantised torch model; returns the latter's outputs."""
        from polygraphy.comparator import Comparator

        from calibration.model import quantised_model

        model = quantised_model(self.quant)
        onnx = SessionRunner(ONNX, lambda: OnnxSession(self.out / "onnx", self.quant.config, self.marked))
        torch = SessionRunner(TORCH, lambda: TorchSession(model, watch_layers=True))
        lockstep = LockstepRunner(LOCKSTEP, lambda: TorchSession(model, watch_layers=True), onnx, self.nodes)
        pairs = {"export": (1, 0), "operator": (2, 0)}
        engine = self.engine_runner()
        if engine is not None:
            pairs["kernel"] = (0, 3)
        kept: list[dict[str, np.ndarray]] = []

        def keep(stream: Any) -> Iterator[Any]:
            for results in stream:
                wanted = ("logits", *map(layer_output, range(self.quant.layers)))
                kept.append({name: torch.outputs[name] for name in wanted})
                yield results

        runners = [onnx, torch, lockstep, *([engine] if engine else [])]
        self.compare(keep(Comparator.run(runners, self.feeds(onnx), streaming=True)), pairs)
        return kept

    def engine_runner(self) -> SessionRunner | None:
        """The engine's runner; None, with a note, where there is no engine or no GPU."""
        folder = self.out / "engine"
        if not (folder / ENGINE_FILE).is_file():
            self.notes.append("No engine was built, so the CUDA kernels were not run.")
        elif not gpu_capabilities():
            self.notes.append("No GPU here: the engine was built but not run, so the CUDA kernels were not executed in this validation.")
        else:
            def make() -> DecoderSession:
                return TensorrtSession(folder, self.quant.config)

            return SessionRunner(ENGINE, make)
        return None

    def run_float(self, references: list[dict[str, np.ndarray]]) -> None:
        """The fake-quantised model's outputs against the float model on the same tokens."""
        from polygraphy.comparator import Comparator, IterationResult, RunResults

        from calibration.checkpoint import open_checkpoint
        from calibration.model import float_model

        try:
            checkpoint = open_checkpoint(self.options.model or _model_of(self.out), self.options.offline)
        except InputError as error:
            self.notes.append(f"The float model could not be opened, so the quantisation error was not measured. {error}")
            return
        if checkpoint.fingerprint != self.quant.source["fingerprint"]:
            self.notes.append(f"The float model at {checkpoint.source.path} is not the one that was quantised, so the quantisation error "
                              "was not measured.")
            return
        _check_memory(checkpoint.parameter_count)
        runner = SessionRunner(FLOAT, lambda: TorchSession(float_model(checkpoint), watch_layers=True))

        def both() -> Iterator[Any]:
            stream = Comparator.run([runner], [call.feed for call in self.calls], streaming=True)
            for results, outputs in zip(stream, references, strict=True):
                results.append((TORCH, [IterationResult(outputs=outputs, runner_name=TORCH)]))
                yield RunResults(results)

        self.compare(both(), {"quantisation": (0, 1)})

    def run(self) -> ValidationResult:
        began = time.monotonic()
        _check_memory(sum(int(np.prod(self.quant.tensor(f"{self.quant.family.layer(0)}.{linear.name}.codes").shape))
                          for linear in self.quant.family.linears()) * self.quant.layers)
        self.progress.start("report", 2 * (self.options.steps + 3))
        with captured_log():
            self.run_float(self.run_export())
        self.progress.finish()
        stack = Stack(self.quant.layers, self.nodes, self.quant.scheme)
        rows = judge(self.errors, stack)
        facts = {"tokens": self.tokens, "steps": self.options.steps, "text": self.options.calib or "the project's default text",
                 "seconds": round(time.monotonic() - began, 2)}
        return ValidationResult(tuple(rows), first_failure(self.errors, rows, stack), tuple(self.notes), facts)


def _model_of(out: Path) -> str:
    from calibration.artifact import read_json

    return str(read_json(out / "manifest.json").get("request", {}).get("model", ""))


def _check_memory(weights: int) -> None:
    """Refuse before the kernel kills us: the reference holds every weight in fp32."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _meminfo(), re.MULTILINE)
    if found is None:
        return
    free = int(found.group(1)) * 1024
    if 4 * weights > free:
        raise InputError("validation", f"got {free / 1e9:.2f} GB of free memory, expected {4 * weights / 1e9:.2f} GB for the fp32 "
                         "reference",
                         "Use --until engine here, and validate on a machine with more memory")


def _meminfo() -> str:
    try:
        return Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return ""  # not Linux


def validate(out: Path, options: ValidateOptions | None = None, progress: Progress | None = None) -> ValidationResult:
    """Compare an artefact folder's ONNX model (and engine) with the torch references on real text.

    Args:
        out: OUT with quant/ and onnx/; engine/ takes part where there is a GPU.

    Raises:
        InputError: a stage is missing or damaged, the text is too short, or the memory does not suffice.
    """
    return _Validator(Path(out), options or ValidateOptions(), progress or NullProgress()).run()
