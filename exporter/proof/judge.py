"""Turns measured errors into a table per layer, and names the first operator that is out of
tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from calibration.quant.scheme import FLOAT_BITS, LARGEST_FLOAT16
from exporter.graph.names import is_routed, layer_of, layer_output, new_key
from exporter.proof.limits import Limits, coarsest
from exporter.proof.metrics import TensorError
from exporter.run.finite import WIDER

if TYPE_CHECKING:
    from calibration.families import Decoder
    from calibration.quant.folder import QuantModel
    from calibration.quant.scheme import QuantScheme
    from exporter.proof.runners import GemmNode

__all__ = [
    "AGAINST",
    "AS_RUN",
    "INNER",
    "LEVELS",
    "PROOF_ENGINE",
    "WEIGHTS",
    "LayerReport",
    "LeftOut",
    "Stack",
    "first_failure",
    "judge",
    "left_out",
]

# the level before these: tensors of quant/ against the float model's, see weights.py
WEIGHTS = "weights"
AS_RUN, PROOF_ENGINE, AGAINST = "as run", "engine", "against"
LEVELS = (
    "export",
    "native",
    AS_RUN,
    "kernel",
    PROOF_ENGINE,
    AGAINST,
    "quantisation",
)  # a failure is named in this order
# The comparison of each operator given its inputs, of the levels that have one.
INNER = {
    "export": "operator",
    AS_RUN: "operator as run",
    PROOF_ENGINE: "operator in the engine",
}
_BETWEEN = {
    WEIGHTS: "the tensors in quant/ against the float model's",
    "export": "ONNX Runtime against the fake-quantised torch reference",
    "native": "the native CPU kernels against the function bodies, both in ONNX Runtime",
    AS_RUN: "the ONNX file as users run it against the rounded graph",
    "kernel": "the TensorRT engine against ONNX Runtime",
    PROOF_ENGINE: "TensorRT's engines with inner tensors as outputs against the rounded graph",
    AGAINST: "this artifact against the other one, both in ONNX Runtime",
    "quantisation": "the fake-quantised torch reference against the float model",
}
Errors = Mapping[tuple[str, str, str], TensorError]


@dataclass(frozen=True)
class LayerReport:
    """Errors of one tensor of the residual stream (or the logits, or a cache tensor) in one phase,
    or of one tensor in quant/.

    Attributes:
        level: "weights" or one of LEVELS: what was compared.
        phase: "prefill", "decode" or "padded batch"; "" for weights.
        tensor: its ONNX name, or its name in quant/.
        cosine, snr_db, max_abs, relative: accumulated error up to here; relative and SNR treat
            every token alike.
        limit: for `relative`; None where any error may be honest.
        agreement: share of tokens with the same largest logit; None for other tensors.
        operator: this layer's operator nearest to (or furthest beyond) its own limit, given its
            inputs; "" if not measured; of weights the worst row, such as "row 7".
        operator_error, operator_limit: relative, of that operator; without a limit the error is
            shown but not judged.
        overflow: the layer's first operator whose numbers the model's type cannot hold, or "".
    """

    level: str
    phase: str
    tensor: str
    cosine: float | None
    snr_db: float | None
    max_abs: float | None
    relative: float | None
    limit: float | None
    agreement: float | None = None
    operator: str = ""
    operator_error: float | None = None
    operator_limit: float | None = None
    overflow: str = ""

    @property
    def judged(self) -> bool:
        """Whether there is a limit that an error is held against."""
        return self.limit is not None or self.operator_limit is not None

    @property
    def ok(self) -> bool:
        """Whether the tensor is finite and both errors are within their limits."""
        if (
            self.overflow
            or self.relative is None
            or (self.limit is not None and self.relative > self.limit)
        ):
            return False
        if not self.operator or self.operator_limit is None:
            return True
        return self.operator_error is not None and self.operator_error <= self.operator_limit


@dataclass(frozen=True)
class Operator:
    """One operator's tensor in a decoder layer, and what its error is held against."""

    name: str
    tensor: str
    kind: str  # "gemm", "attention", "cache" or "pointwise"


@dataclass(frozen=True)
class Stack:
    """The decoder, for judging it; `exceptions` are the nodes that `scheme` does not hold for, `only`
    the decoder layers that are judged (with the last of them the head; None: all).
    """

    decoder: Decoder
    nodes: list[GemmNode]
    scheme: QuantScheme
    exceptions: Mapping[str, QuantScheme] = field(default_factory=dict)
    only: range | None = None

    @classmethod
    def of(cls, quant: QuantModel, nodes: list[GemmNode], only: range | None = None) -> Stack:
        """Of a quantized model: its nodes, and how each is quantized."""
        others = {
            node: scheme
            for node in quant.decoder.nodes
            if (scheme := quant.scheme_of(node)) != quant.scheme
        }
        return cls(quant.decoder, nodes, quant.scheme, others, only)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.decoder.layers

    @property
    def judged(self) -> range:
        """The decoder layers to be judged; `self.layers` stands for the head."""
        if self.only is None:
            return range(self.layers + 1)
        return range(self.only.start, self.only.stop + (self.only.stop == self.layers))

    def operators(self, index: int) -> list[Operator]:
        """Of decoder layer `index` in execution order; `self.layers` stands for the head."""
        if index == self.layers:
            return self._head()
        prefix, found = f"{self.decoder.blocks[index].prefix}.", list[Operator]()
        for node in (item for item in self.nodes if item.name.startswith(prefix)):
            if node.site.attention:
                found += [*self._cache(index), Operator(node.source, node.source, "attention")]
            # With its norm, the first node reads the layer before.
            elif node.source != layer_output(index - 1):
                found.append(Operator(node.source, node.source, "pointwise"))
            found.append(_gemm(node))
        return [*found, Operator(layer_output(index), layer_output(index), "pointwise")]

    def _head(self) -> list[Operator]:
        nodes = [node for node in self.nodes if node.name == self.decoder.head.name]
        if not nodes:  # its norm and its table in one
            return [Operator(self.decoder.head.name, "logits", "pointwise")]
        norms = [Operator(node.source, node.source, "pointwise") for node in nodes if not node.norm]
        return [*norms, *map(_gemm, nodes), Operator("logits", "logits", "pointwise")]

    def _cache(self, index: int) -> list[Operator]:
        kept = (f"present.{index}.key", f"present.{index}.value")
        if self.scheme.kv_bits == FLOAT_BITS:
            return [Operator(name, name, "pointwise") for name in kept]
        return [
            Operator(new_key(index), new_key(index), "pointwise"),
            *(Operator(name, name, "cache") for name in kept),
        ]

    def native(self, tensor: str) -> float:
        """Limit of a tensor that a native kernel, or the same standard op, made of given inputs. A
        GEMM of integers and a cache's codes are the same numbers, whoever computes them.
        """
        limits = Limits(self.scheme)
        if any(
            node.result == tensor and self._scheme(node).abits == FLOAT_BITS for node in self.nodes
        ):
            return limits.gemm()
        if any(node.source == tensor and node.site.attention for node in self.nodes):
            return limits.attention()
        if self.scheme.dtype == "float32" and any(node.source == tensor for node in self.nodes):
            return limits.pointwise()  # an exponential's last bits in fp64 may show
        return 0.0

    def inside(self, level: str, operator: Operator) -> float:
        """Limit of an operator given its inputs, at a level of INNER."""
        node = next((node for node in self.nodes if node.result == operator.tensor), None)
        limits = Limits(self._scheme(node) if node else self.scheme)
        if level == AS_RUN:
            return limits.unrounded(operator.kind)
        return limits.operator(operator.kind)

    def _scheme(self, node: GemmNode) -> QuantScheme:
        """How a node is quantized; one in floating point has no activation codes."""
        scheme = self.exceptions.get(node.name, self.scheme)
        return replace(scheme, abits=FLOAT_BITS) if node.site.linears.floats else scheme

    def limit(self, level: str, tensor: str) -> float | None:
        """Of the accumulated error of a layer's output, a cache tensor or the logits; of the native
        level, whose inputs are given, of this tensor alone.
        """
        if level == "native":
            return self.native(tensor)
        layer = layer_of(tensor)
        depth = (self.layers if layer is None else layer) + 1
        # Errors come from the nodes so far: a later layer's coarse bits must not loosen this one's
        # limit.
        so_far = [
            node
            for node in self.nodes
            if layer is None or ((place := layer_of(node.name)) is not None and place <= layer)
        ]
        if self.decoder.routers and level != "export":
            return None  # a token that goes to another expert is no error
        limits = Limits(coarsest(map(self._scheme, so_far)))
        count = sum(node.name in self.decoder.path for node in so_far)
        if level == "quantisation":
            return limits.quantisation(count)
        return limits.accumulated(depth, count)


def _gemm(node: GemmNode) -> Operator:
    norm = f" (with {node.norm.rpartition('.')[2]})" if node.norm else ""
    return Operator(node.name + norm, node.result, "gemm")


def _size(operator: Operator, error: TensorError) -> float:
    """What of an operator's error is held against its limit."""
    return error.worst_channel[1] if operator.kind == "gemm" else error.relative


@dataclass(frozen=True)
class LeftOut:
    """Where a session leaves roundings out.

    Attributes:
        operators, of: how many, of how many, are further from the rounded graph than a last rounding,
            and no further than a rounding that was left out explains: what is further is wrong.
        operator: the one that is furthest beyond it, or "".
        error, rounding: its error, and what a last rounding is.
    """

    operators: int
    of: int
    operator: str = ""
    error: float = 0.0
    rounding: float = 0.0


def left_out(errors: Errors, stack: Stack) -> LeftOut:
    """Of the session that users run; none where its operators were not judged."""
    sizes: dict[str, tuple[float, float]] = {}  # what each shows, and its last rounding
    wrong = set[str]()
    for phase in _phases(errors, INNER[AS_RUN]):
        operators = [one for index in stack.judged for one in stack.operators(index)]
        for operator, error in _found(errors, INNER[AS_RUN], phase, operators):
            size = _size(operator, error)
            largest = max(size, sizes.get(operator.name, (0.0, 0.0))[0])
            sizes[operator.name] = largest, stack.inside("export", operator)
            if not size <= stack.inside(AS_RUN, operator):
                wrong.add(operator.name)
    beyond = {name: size for name, size in sizes.items() if size[0] > size[1] and name not in wrong}
    if not beyond:
        return LeftOut(0, len(sizes))
    worst = max(beyond, key=lambda name: beyond[name][0] / beyond[name][1])
    return LeftOut(len(beyond), len(sizes), worst, *beyond[worst])


def _phases(errors: Errors, comparison: str) -> list[str]:
    """The phases in which something was compared."""
    return list(dict.fromkeys(phase for compared, phase, _ in errors if compared == comparison))


def judge(errors: Errors, stack: Stack) -> list[LayerReport]:
    """The table, by level and phase, then from the first layer to the logits."""
    rows = []
    for level in LEVELS:
        for phase in _phases(errors, level):
            for index in stack.judged:
                tensors = [layer_output(index) if index < stack.layers else "logits"]
                if level in ("kernel", AS_RUN) and index < stack.layers:
                    tensors = [
                        f"present.{index}.key",
                        f"present.{index}.value",
                    ]  # what runs as it is shows no inner tensors
                rows += [
                    _row(errors, stack, (level, phase, tensor), index, tensor is tensors[-1])
                    for tensor in tensors
                ]
    return rows


def _found(
    errors: Errors, comparison: str, phase: str, operators: list[Operator]
) -> list[tuple[Operator, TensorError]]:
    """Operators with their errors, but for experts that no token reached."""
    return [
        (one, errors[comparison, phase, one.tensor])
        for one in operators
        if (comparison, phase, one.tensor) in errors or not is_routed(one.tensor)
    ]


def _row(
    errors: Errors, stack: Stack, key: tuple[str, str, str], index: int, last: bool
) -> LayerReport:
    """Of a tensor; with the `last` one of a layer go its operators."""
    level, phase, tensor = key
    total = errors[key]
    worst, overflow = ("", 0.0, 0.0), ""
    if last and phase in _phases(errors, INNER.get(level, "")):
        found = _found(errors, INNER[level], phase, stack.operators(index))
        overflow = next((one.name for one, error in found if _overflows(error, stack)), "")
        worst = max(
            ((one.name, _size(one, error), stack.inside(level, one)) for one, error in found),
            key=lambda item: item[1] / item[2],
        )
    if level == "native":
        worst = _worst_native(errors, stack, phase, index)
    measured = (
        {"operator": worst[0], "operator_error": _finite(worst[1]), "operator_limit": worst[2]}
        if worst[0]
        else {}
    )
    return LayerReport(
        level,
        phase,
        tensor,
        _finite(total.cosine),
        _finite(total.snr_db),
        _finite(total.max_abs),
        _finite(total.relative),
        stack.limit(level, tensor),
        total.agreement if tensor == "logits" else None,
        overflow=overflow,
        **measured,  # type: ignore[arg-type]
    )


def _worst_native(errors: Errors, stack: Stack, phase: str, index: int) -> tuple[str, float, float]:
    """(name, error, limit) of the first operator beyond its limit; else of the nearest to one that
    is not 0, if there is any.
    """
    shown = ("", 0.0, 0.0)
    for one, total in _found(errors, "native", phase, stack.operators(index)):
        limit, error = stack.native(one.tensor), _size(one, total)
        if not error <= limit:
            return one.name, error, limit
        if limit and (not shown[0] or error / limit > shown[1] / shown[2]):
            shown = one.name, error, limit
    return shown


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def first_failure(errors: Errors, rows: list[LayerReport], stack: Stack) -> str:
    """One line on the first operator out of tolerance, else on the first accumulated error; "" if
    there is none.
    """
    failed = [row for row in rows if not row.ok]
    if not failed:
        return ""
    if failed[0].level == WEIGHTS:
        return _bad_weights(failed[0])
    for row in failed:
        if row.level == "export" and (found := _first_operator(errors, row, stack, failed)):
            return found
    row = failed[0]
    if row.level in INNER and (found := _first_operator(errors, row, stack, failed)):
        return found
    if row.level == "native" and row.operator:
        where = f"at {row.operator} (native, {row.phase}: {_BETWEEN['native']})"
        if not row.operator_limit:
            return f"got other numbers {where}, expected the same bits"
        error = "NaN or Inf" if row.operator_error is None else f"{row.operator_error:.2g}"
        return f"got a relative error of {error} {where}, expected at most {row.operator_limit:.2g}"
    got = f"{row.relative:.2g}" if row.relative is not None else "NaN or Inf"
    expected = f"at most {row.limit:.2g}" if row.limit is not None else "finite numbers"
    return (
        f"got an accumulated relative error of {got} at {row.tensor} ({row.level}, {row.phase}: "
        f"{_BETWEEN[row.level]}), "
        f"expected {expected}"
    )


def _bad_weights(row: LayerReport) -> str:
    end = f"at {row.tensor} ({WEIGHTS}: {_BETWEEN[WEIGHTS]}), expected"
    if row.relative is None:
        return (
            f"got a tensor that is missing, of another shape or not finite {end} the float model's"
        )
    if row.limit is not None and row.relative > row.limit:
        return f"got a relative error of {row.relative:.2g} {end} at most {row.limit:.2g}"
    return (
        f"got a relative error of {row.operator_error:.2g} in {row.operator} {end} at most "
        f"{row.operator_limit:.2g}"
    )


def _first_operator(
    errors: Errors, row: LayerReport, stack: Stack, failed: list[LayerReport]
) -> str:
    level, phase = row.level, row.phase
    if phase not in _phases(errors, INNER[level]):
        return ""
    overflows = {row.overflow for row in failed if (row.level, row.phase) == (level, phase)}
    for index in stack.judged:
        for operator, error in _found(errors, INNER[level], phase, stack.operators(index)):
            got, limit = _size(operator, error), stack.inside(level, operator)
            if operator.name in overflows:
                return _too_large(errors, row, operator, index, stack)
            if not got <= limit:
                channel = (
                    f" in output channel {error.worst_channel[0]}"
                    if operator.kind == "gemm" and error.finite
                    else ""
                )
                return (
                    f"got a relative error of {got:.2g}{channel} at {operator.name} given its "
                    f"inputs ({level}, {phase}: "
                    f"{_BETWEEN[level]}), expected at most {limit:.2g}"
                )
    return ""


def _overflows(error: TensorError, stack: Stack) -> bool:
    """Whether float16 cannot hold an operator's tensor. The reference, like the kernels, then gives
    the largest number, or NaN further on.
    """
    return stack.scheme.dtype == "float16" and error.peak >= LARGEST_FLOAT16


def _too_large(
    errors: Errors, row: LayerReport, operator: Operator, index: int, stack: Stack
) -> str:
    tensor = layer_output(index) if index < stack.layers else "logits"
    real = errors.get(("quantisation", row.phase, tensor))
    peak = 0.0 if real is None else real.peak
    known = f", {peak:.3g} at {tensor} of the float model" if peak > LARGEST_FLOAT16 else ""
    return (
        f"got numbers beyond float16 at {operator.name} ({row.level}, {row.phase}){known}, expected at most "
        f"{LARGEST_FLOAT16:g}: export with {WIDER}"
    )
