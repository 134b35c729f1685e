"""What each node of a quantized model costs: its KL divergence from the float model with the node back in
floating point, found by halving ranges of layers; and which bits would buy the most.

A gain is the divergence that a change takes away from the model as it is, in nats per token. Gains of
several changes need not add up to that of all of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.budget.choice import allocate
from calibration.out.files import write_json
from calibration.out.fingerprint import CALIBRATION_CODE, code_digest, digest
from calibration.out.json_file import read_record
from calibration.quant.bits import Rule
from calibration.quant.scheme import FLOAT_BITS, QuantScheme
from calibration.quant.sizes import node_bits
from exporter.graph.names import layer_of
from exporter.proof.swaps import Swap, Swapped
from plugins.errors import InputError

if TYPE_CHECKING:
    from numpy import ndarray

    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel
    from exporter.proof.quality import Quality

__all__ = ["Attribution", "AttributionJob", "Means", "Plan", "attribute"]

AS_IS, ALL, WEIGHTS, ACTIVATIONS, CACHE = (
    "as it is",
    "everything",
    "weights",
    "activations",
    "KV cache",
)
_TOGETHER = 8  # changes of one walk through the layers
_WORTH = 0.02  # of all that can be gained: a range that brings less is not looked into
_NEEDS_ACTIVATIONS = (
    0.01  # of the divergence: least gain of a node's floats that asks for 8 bits of them
)
_MORE_BITS, _FINE = (1, 2, 4), 8
_OTHER_BITS = "other bits: "


@dataclass(frozen=True)
class AttributionJob:
    """What is measured.

    Attributes:
        quant: the quantized model.
        checkpoint: its float model.
        windows: tokens int64 [n, L].
        text: the name of what they are of.
        calibration: others [m, L], by which nodes of other bits are quantized where the model's method
            looks at data.
        max_context: most tokens of a sequence of the export.
        record: a JSON file that keeps what was measured.
        minutes: no walk begins that would not leave time for itself and the check of the plan; 0 is no
            bound. The first walk and the check always run.
        add_bits: bits per weight of the linears on average that a plan may add.
    """

    quant: QuantModel
    checkpoint: Checkpoint
    windows: ndarray
    text: str
    calibration: ndarray
    max_context: int
    record: Path
    minutes: float = 0.0
    add_bits: float = 0.25


@dataclass(frozen=True)
class Means:
    """Of one model against the float model: mean KL(float || model) in nats, perplexity, and the share of
    predictions with the same most likely token.
    """

    kl: float
    ppl: float
    top1: float


@dataclass(frozen=True)
class Plan:
    """Bits that would buy the most.

    Attributes:
        lines: of a bits file, behind those that the artifact has.
        bits_before, bits_after: per weight of the linears, scales and zero points included.
        expected: KL that the measured gains promise.
        found: the model with these nodes quantized anew, see Swap.
    """

    lines: tuple[str, ...]
    bits_before: float
    bits_after: float
    expected: float
    found: Means


@dataclass(frozen=True)
class Attribution:
    """What was found.

    Attributes:
        text, windows, seqlen: what it was measured on.
        float_ppl: perplexity of the float model.
        found: the model as it is.
        parts: {"everything", "weights", "activations", "KV cache", "lm_head": with all of it in
            floating point}; of what the model has.
        layers: [first, last, Means] of ranges of layers, that of a single one if both are the same.
        nodes: {GEMM node, or "layer 3, KV cache": with it in floating point}.
        nodes_left: GEMM nodes that were not measured by themselves.
        finished: whether no range that is worth it was left for want of time.
        plan: None where nothing that fits would gain.
    """

    text: str
    windows: int
    seqlen: int
    float_ppl: float
    found: Means
    parts: Mapping[str, Means]
    layers: Sequence[tuple[int, int, Means]]
    nodes: Mapping[str, Means]
    nodes_left: int
    finished: bool
    plan: Plan | None

    def gain(self, means: Means) -> float:
        """What a change takes away, in nats per token."""
        return self.found.kl - means.kl

    def ranked(self) -> list[tuple[str, float]]:
        """Nodes and caches by their gains, largest first."""
        gains = [(name, self.gain(means)) for name, means in self.nodes.items()]
        return sorted(gains, key=lambda item: -item[1])

    def unopened(self) -> list[tuple[str, float]]:
        """Ranges of layers that were not looked into by their gains, the largest for a layer first."""
        ranges = [(first, last) for first, last, _ in self.layers]
        opened = {layer_of(node) for node in self.nodes}
        found = [
            (first, last, self.gain(means))
            for first, last, means in self.layers
            if not any(
                first <= one <= other <= last and (one, other) != (first, last)
                for one, other in ranges
            )
            and first not in opened
        ]
        found.sort(key=lambda item: item[2] / (item[0] - item[1] - 1))
        return [(_range_name(first, last + 1), gain) for first, last, gain in found]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


@dataclass
class _Record:
    """The file.

    Attributes:
        fingerprint: of model and text, whose measurements it has.
        quant: of the quantized model alone, for a report of it.
        float_ppl: perplexity of the float model.
        measured: by name.
        found: the last Attribution that was finished, as plain JSON, or nothing.
    """

    fingerprint: str
    quant: str
    float_ppl: float
    measured: dict[str, Means]
    found: dict[str, Any]


@dataclass(frozen=True)
class _Unit:
    """What may get other bits: a GEMM node, or a range of layers that was not looked into."""

    name: str  # of its measurement
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class _Option:
    """Bits for a unit.

    Attributes:
        labels: {GEMM node: its bits as a bits file has them}; none where it stays as it is.
        bits: of the nodes together.
        left: of what the unit costs, in nats per token, expected.
    """

    labels: Mapping[str, str]
    bits: int
    left: float


def attribute(
    job: AttributionJob, progress: Progress, now: Callable[[], float] = time.monotonic
) -> Attribution:
    """Measure, as far as the time goes; what the record has of the same model and text is kept.

    Args:
        job: what is measured.
        progress: a stage for each walk through the layers.
        now: seconds, for the bound.

    Raises:
        CheckError: a model computes NaN. InputError: the record cannot be written.
    """
    return _Search(job, progress, now).run()


class _Search:
    def __init__(self, job: AttributionJob, progress: Progress, now: Callable[[], float]) -> None:
        self._job, self._progress, self._now = job, progress, now
        self._quant, self._decoder = job.quant, job.quant.decoder
        self._end = now() + 60 * job.minutes if job.minutes else float("inf")
        self._longest = self._last = 0.0  # seconds of a walk
        self._model: Swapped | None = None
        self._record = self._read()
        if self._record.measured:
            progress.message(f"attribute: kept {len(self._record.measured)} earlier measurements")

    def _read(self) -> _Record:
        job = self._job
        stamp = digest(
            job.quant.files,
            job.quant.source["fingerprint"],
            *(
                hashlib.sha256(rows.tobytes()).hexdigest()
                for rows in (job.windows, job.calibration)
            ),
            [list(rows.shape) for rows in (job.windows, job.calibration)],
            job.max_context,
            code_digest(*CALIBRATION_CODE, "exporter/proof/swaps.py"),
        )
        if job.record.is_file():
            with suppress(InputError):  # a damaged one is measured again
                found = read_record(job.record, _Record)
                if found.fingerprint == stamp:
                    return found
        return _Record(stamp, digest(job.quant.files), 0.0, {}, {})

    def run(self) -> Attribution:
        parts = dict(self._parts())
        layers = self._decoder.layers
        halves = [(0, layers)] if layers == 1 else [*_halves(0, layers)]
        self._measure(parts | {_range_name(*part): self._range(*part) for part in halves}, True)
        finished = self._descend(halves)
        units = [unit for part in halves for unit in self._units(*part)]
        found = self._result(finished, self._plan(units))
        self._record.found = found.as_dict()
        write_json(self._job.record, asdict(self._record))
        return found

    # ---------------------------------------------------------------- what there is

    def _parts(self) -> Iterator[tuple[str, Swap]]:
        """The model as it is, and with one kind of numbers in floating point."""
        quant, nodes = self._quant, frozenset(self._decoder.nodes)
        caches = frozenset(range(self._decoder.layers if quant.scheme.kv_bits < FLOAT_BITS else 0))
        codes = frozenset(n for n in nodes if quant.scheme_of(n).abits < FLOAT_BITS)
        yield AS_IS, Swap()
        yield ALL, Swap(nodes, codes, caches)
        yield WEIGHTS, Swap(weights=nodes)
        if codes:
            yield ACTIVATIONS, Swap(activations=codes)
        if caches:
            yield CACHE, Swap(caches=caches)
        if self._decoder.head.quantized:
            yield self._decoder.head.name, _whole(self._decoder.head.name)

    def _nodes(self, first: int, end: int) -> tuple[str, ...]:
        """GEMM nodes of layers first..end-1."""
        blocks = self._decoder.blocks[first:end]
        return tuple(block.name(node) for block in blocks for node in block.quantized)

    def _range(self, first: int, end: int) -> Swap:
        """Layers first..end-1 in floating point."""
        nodes = frozenset(self._nodes(first, end))
        return Swap(nodes, nodes, frozenset(range(first, end)))

    def _children(self, first: int, end: int) -> dict[str, Swap]:
        """The halves of a range, or a layer's nodes and its cache."""
        if end - first > 1:
            return {_range_name(*half): self._range(*half) for half in _halves(first, end)}
        found = {name: _whole(name) for name in self._nodes(first, end)}
        if self._quant.scheme.kv_bits < FLOAT_BITS:
            found[_cache_name(first)] = Swap(caches=frozenset([first]))
        return found

    # ---------------------------------------------------------------- measuring

    def _gain(self, name: str) -> float:
        measured = self._record.measured
        return measured[AS_IS].kl - measured[name].kl

    def _measure(self, swaps: Mapping[str, Swap], always: bool = False) -> bool:
        """Measure what the record lacks, some together; False where time ran out before the end."""
        left = [name for name in swaps if name not in self._record.measured]
        for start in range(0, len(left), _TOGETHER):
            if not always and self._now() + 2 * self._longest > self._end:
                return False
            self._walk({name: swaps[name] for name in left[start : start + _TOGETHER]})
        return True

    def _walk(self, swaps: Mapping[str, Swap]) -> None:
        job, layers, began = self._job, self._decoder.layers, self._now()
        fresh = self._model is None
        self._progress.start("attribute", layers * (1 + fresh))
        if self._model is None:
            self._model = Swapped(
                job.quant,
                job.checkpoint,
                job.windows,
                job.calibration,
                job.max_context,
                self._progress,
            )
            self._record.float_ppl = _means(self._model.baseline, "the float model").ppl
        found = self._model.measure([*swaps.values()], self._progress)
        self._record.measured |= {
            name: _means(total, name) for name, total in zip(swaps, found, strict=True)
        }
        write_json(job.record, asdict(self._record))
        self._progress.finish()
        self._last = self._now() - began
        self._longest = max(self._longest, self._last)
        for name in swaps:
            self._progress.message(f"  KL {self._record.measured[name].kl:.5f} {_said(name)}")

    def _descend(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Look into the ranges that bring enough, those that bring the most for each of their layers
        first; False where time ran out.
        """
        least = _WORTH * max(self._gain(ALL), 0.0)
        open_ranges = list(ranges)
        while True:
            open_ranges = [part for part in open_ranges if self._gain(_range_name(*part)) > least]
            open_ranges.sort(key=lambda part: self._gain(_range_name(*part)) / (part[0] - part[1]))
            if not open_ranges:
                return True
            swaps: dict[str, Swap] = {}
            taken: list[tuple[int, int]] = []
            for part in open_ranges:
                children = self._children(*part)
                if not taken or len(swaps) + len(children) <= _TOGETHER:
                    swaps |= children
                    taken.append(part)
            if not self._measure(swaps):
                return False
            open_ranges = [part for part in open_ranges if part not in taken]
            open_ranges += [
                half for part in taken if part[1] - part[0] > 1 for half in _halves(*part)
            ]
            if self._last:  # else all of it was known
                self._progress.message(self._ahead(open_ranges))

    def _ahead(self, open_ranges: Sequence[tuple[int, int]]) -> str:
        """How much is left at most."""
        counts = [
            2 * (end - first - 1) + (end - first) * len(self._children(first, first + 1))
            for first, end in open_ranges
        ]
        walks = -(-sum(counts) // _TOGETHER)
        return f"at most {sum(counts)} more, {walks * self._last / 60:.1f} min"

    def _units(self, first: int, end: int) -> Iterator[_Unit]:
        """The smallest parts of a range that were measured, of GEMM nodes."""
        children = self._children(first, end)
        if not children.keys() <= self._record.measured.keys():
            yield _Unit(_range_name(first, end), self._nodes(first, end))
        elif end - first > 1:
            for half in _halves(first, end):
                yield from self._units(*half)
        else:
            yield from (_Unit(node, (node,)) for node in self._nodes(first, end))

    # ---------------------------------------------------------------- what would buy the most

    def _plan(self, units: Sequence[_Unit]) -> Plan | None:
        """Bits for some nodes within the room, checked by a walk of its own."""
        quant = self._quant
        units = [unit for unit in units if self._gain(unit.name) > 0]
        options = [self._options(unit) for unit in units]
        costs = [[(option.bits, option.left) for option in choices] for choices in options]
        weights = int(quant.sizes["linear_weights"])
        room = sum(choices[0][0] for choices in costs) + int(self._job.add_bits * weights)
        chosen = allocate(costs, room)
        labels = {
            node: label
            for choices, at in zip(options, chosen, strict=True)
            for node, label in choices[at].labels.items()
        }
        if not labels:
            return None
        lines = list(self._lines(labels))
        name = _OTHER_BITS + ", ".join(" ".join(line) for line in lines)
        schemes = {node: Rule(node, label).scheme(quant.scheme) for node, label in labels.items()}
        self._measure({name: Swap(schemes=schemes)}, True)
        pairs = [(cost[0], cost[at]) for cost, at in zip(costs, chosen, strict=True)]
        before = float(quant.sizes["linear_quant_bits"]) / weights
        width = max(len(pattern) for pattern, _ in lines)
        return Plan(
            tuple(f"{pattern:{width}} {label}" for pattern, label in lines),
            before,
            before + sum(new[0] - old[0] for old, new in pairs) / weights,
            max(self._record.measured[AS_IS].kl - sum(old[1] - new[1] for old, new in pairs), 0.0),
            self._record.measured[name],
        )

    def _options(self, unit: _Unit) -> list[_Option]:
        """A unit as it is, then with what it could have.

        A bit more halves the steps of a grid, and what a small error costs grows with its square. How
        much of a gain is that of weights is taken to be as in the whole model.
        """
        sites, whole = self._decoder.sites, self._gain(unit.name)
        kinds = {kind: max(self._gain(kind), 0.0) for kind in self._kinds(unit)}
        total = sum(kinds.values()) or 1.0
        weights, activations = (
            whole * kinds.get(kind, 0.0) / total for kind in (WEIGHTS, ACTIVATIONS)
        )
        schemes = {node: self._quant.scheme_of(node) for node in unit.nodes}
        size = sum(node_bits(sites[node].linears, scheme) for node, scheme in schemes.items())
        found = [_Option({}, size, whole)]
        coarse = min(scheme.abits for scheme in schemes.values())
        asks = activations > _NEEDS_ACTIVATIONS * self._gain(ALL) and coarse < _FINE
        for more in (*([0] if asks else []), *_MORE_BITS):
            fine = _FINE if asks else 0
            labels = {node: self._label(scheme, more, fine) for node, scheme in schemes.items()}
            try:
                bits = sum(
                    node_bits(sites[node].linears, Rule(node, label).scheme(self._quant.scheme))
                    for node, label in labels.items()
                )
            except InputError:
                continue  # too many, or no op takes them
            saved = weights * (1 - 4.0**-more)
            saved += activations * (1 - 4.0 ** (coarse - _FINE)) if asks else 0.0
            found.append(_Option(labels, bits, whole - saved))
        return found

    def _kinds(self, unit: _Unit) -> list[str]:
        """What of the whole model a unit has a part in."""
        kinds = [WEIGHTS, ACTIVATIONS, *([] if unit.nodes == (unit.name,) else [CACHE])]
        return [kind for kind in kinds if kind in self._record.measured]

    def _label(self, scheme: QuantScheme, more: int, fine: int) -> str:
        """More weight bits, and as many for activations as `fine` at least, as a bits file has them."""
        group = ""
        if scheme.group_size != self._quant.scheme.group_size:
            group = f"-g{scheme.group_size}"
        codes = str(scheme.wbits + more) if more else scheme.codes.label
        return f"w{codes}a{max(scheme.abits, fine)}{group}"

    def _lines(self, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """(pattern, bits) of a bits file; a layer whose nodes all get the same is one."""
        for block in self._decoder.blocks:
            nodes = [node for node in map(block.name, block.quantized) if node in labels]
            kinds = {labels[node] for node in nodes}
            if len(nodes) == len(block.quantized) and len(kinds) == 1:
                yield f"{block.prefix}.*", kinds.pop()
            else:
                yield from ((node, labels[node]) for node in nodes)

    # ---------------------------------------------------------------- the result

    def _result(self, finished: bool, plan: Plan | None) -> Attribution:
        measured, decoder = self._record.measured, self._decoder
        caches = [name for name in map(_cache_name, range(decoder.layers)) if name in measured]
        nodes = [node for node in decoder.nodes if node in measured]
        return Attribution(
            text=self._job.text,
            windows=len(self._job.windows),
            seqlen=self._job.windows.shape[1],
            float_ppl=self._record.float_ppl,
            found=measured[AS_IS],
            parts={name: measured[name] for name, _ in self._parts() if name != AS_IS},
            layers=[
                (first, end - 1, measured[name])
                for first in range(decoder.layers)
                for end in range(decoder.layers, first, -1)
                if (name := _range_name(first, end)) in measured
            ],
            nodes={name: measured[name] for name in (*nodes, *caches)},
            nodes_left=len(decoder.nodes) - len(nodes),
            finished=finished,
            plan=plan,
        )


def _whole(node: str) -> Swap:
    return Swap(frozenset([node]), frozenset([node]))


def _said(name: str) -> str:
    """A measured change in a sentence."""
    if name == AS_IS:
        return name
    return f"with {name}" if name.startswith(_OTHER_BITS) else f"with {name} in float"


def _halves(first: int, end: int) -> Iterator[tuple[int, int]]:
    middle = (first + end) // 2
    yield first, middle
    yield middle, end


def _range_name(first: int, end: int) -> str:
    return f"layer {first}" if end == first + 1 else f"layers {first} to {end - 1}"


def _cache_name(layer: int) -> str:
    return f"layer {layer}, {CACHE}"


def _means(total: Quality, name: str) -> Means:
    return Means(**total.means(name))
