"""The quantized model with some of its nodes back in floating point, or in other bits, against the float
model: what attribution measures.

One decoder layer is in memory at a time, quantized and, where a change asks for it, in floating point;
besides there are the two heads and, of every change, the residual stream of the text. That of the model as
it is stays in memory in front of every layer, or of every few of a large model: a walk begins where its
first change is. The arithmetic is fp32 with each node's activation codes, as python -m deploy compare has
it, and so are log-probabilities (an error of 1e-7 nats a token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.blocks.forward import block_output, embedded, float_linear, load_block
from calibration.blocks.rounding import Plain, WeightSolver
from calibration.blocks.walk import site_weight
from calibration.families.steps import Norm
from calibration.methods.qqq.method import round as gptq_rule
from calibration.methods.qqq.settings import QqqSettings
from calibration.methods.rtn import quantize
from calibration.quant.scheme import FLOAT_BITS, QuantLinear, QuantScheme
from calibration.reference.fake_quant import ActivationQuantizer, FakeQuantLinear, fake_quantize
from calibration.reference.model import channel_orders
from calibration.reference.steps import PLAIN, Rope, cached_heads
from calibration.settings import CalibrationSettings
from calibration.solvers.hessian import Moments
from calibration.transforms.smoothing import fold_scales
from exporter.proof.basis import recorded_rotation
from exporter.proof.quality import CHUNK, Quality

if TYPE_CHECKING:
    from numpy import ndarray

    from calibration.blocks.driver import Basis
    from calibration.blocks.forward import BlockWeights
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families.decoder import Block, Decoder, Site
    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel
    from plugins.core.op_spec import QuantArrays

__all__ = ["Swap", "Swapped", "float_block"]

_KEPT = 1 << 30  # bytes of residual streams that stay in memory
Names = frozenset[str]
Function = Callable[[Tensor], Tensor]
Weight = tuple[Tensor, Tensor | None]  # [N, K] and bias [N]


@dataclass(frozen=True)
class Swap:
    """A change to the quantized model; none by default.

    Attributes:
        weights: GEMM nodes that multiply with the float model's weights.
        activations: GEMM nodes that read their inputs as they are, without codes.
        caches: decoder layers whose keys and values stay in floating point.
        schemes: {GEMM node: a scheme in which its float weights are quantized instead}: to nearest
            where the model's method looks at weights alone, else by GPTQ on what it reads.
    """

    weights: Names = frozenset()
    activations: Names = frozenset()
    caches: frozenset[int] = frozenset()
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)

    def within(self, nodes: Names, layer: int | None = None) -> Swap:
        """What it changes in these nodes and in a layer's cache."""
        return Swap(
            self.weights & nodes,
            self.activations & nodes,
            self.caches & {layer},
            {node: scheme for node, scheme in self.schemes.items() if node in nodes},
        )


class Swapped:
    """Measures changed models on a text.

    Args:
        quant: the quantized model.
        checkpoint: its float model.
        windows: tokens int64 [n, L], of which 1..L-1 are predicted.
        calibration: others [m, L], by which nodes of other schemes are quantized.
        max_context: most tokens of a sequence of the export, as Rope.of's.
        progress: advanced once a decoder layer of the float model.

    Attributes:
        baseline: the float model itself.
    """

    def __init__(
        self,
        quant: QuantModel,
        checkpoint: Checkpoint,
        windows: ndarray,
        calibration: ndarray,
        max_context: int,
        progress: Progress,
    ) -> None:
        self._quant, self._checkpoint, self._max_context = quant, checkpoint, max_context
        self._tokens, self._calibration = torch.from_numpy(windows), torch.from_numpy(calibration)
        self._basis: Basis = recorded_rotation(quant) or Plain()
        self._before: dict[int, Tensor] = {}  # of the model as it is, what layer i reads
        with torch.no_grad():
            self._truth = self._float_stream(progress)
            decoder = checkpoint.decoder
            table = checkpoint.tensor(f"{decoder.head_table()}.weight")
            gain = checkpoint.tensor(decoder.head.norm.gain)
            self._float_head = _head(decoder, gain, lambda x: F.linear(x, table))
            self.baseline = self._compare([(self._truth, self._float_head)])[0]

    def _rope(self, block: Block) -> Rope:
        length = self._tokens.shape[1] - 1
        return Rope.of(self._checkpoint, length, "cpu", block.rope, self._max_context)

    @staticmethod
    def _embedded(table: ndarray, decoder: Decoder, tokens: Tensor) -> Tensor:
        """What the first layer reads; of a large table only the rows of the text are made fp32."""
        rows, places = np.unique(tokens[:, :-1].numpy(), return_inverse=True)
        found = torch.from_numpy(table[rows].astype(np.float32))
        return embedded(found, torch.from_numpy(places.reshape(len(tokens), -1)), decoder)

    def _float_stream(self, progress: Progress) -> Tensor:
        """What the float model's final norm reads, [n, L-1, hidden]."""
        decoder = self._checkpoint.decoder
        table = self._checkpoint.array(f"{decoder.embedding.name}.weight")
        x = self._embedded(table, decoder, self._tokens)
        for block in decoder.blocks:
            weights = load_block(self._checkpoint, block.index)
            multiply = float_linear(weights, block)
            x = block_output(x, weights, multiply, block, self._rope(block))
            progress.advance(1, f"float, layer {block.index + 1} of {decoder.layers}")
        return x

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def measure(self, swaps: Sequence[Swap], progress: Progress) -> list[Quality]:
        """Each changed model against the float model, in one walk through the layers. Changes that are
        alike up to a layer share their work so far, and what the model as it is computes in front of the
        first change is kept for further walks.

        Args:
            swaps: the changes.
            progress: advanced once a decoder layer, and at once over those in front of the first change.
        """
        quant, decoder = self._quant, self._quant.decoder
        calibrated = bool(quant.calibration and any(swap.schemes for swap in swaps))
        tokens = torch.cat([self._tokens, self._calibration]) if calibrated else self._tokens
        kept = {} if calibrated else self._before
        walked = list(swaps)
        if not kept:
            table = quant.tensor(f"{decoder.embedding.name}.weight")
            kept[0] = self._embedded(table, decoder, tokens)
            if not calibrated:
                walked.append(Swap())
        changed = min(map(self._first_change, walked))
        first = max(index for index in kept if index <= changed)
        streams = [(kept[first], [*range(len(walked))])]
        every = -(-(decoder.layers + 1) * kept[first].nbytes // _KEPT)
        if first:
            progress.advance(first, f"layer {first} of {decoder.layers}, known")
        for block in decoder.blocks[first:]:
            layer = _Layer(quant, self._checkpoint, self._basis, block, len(self._tokens))
            rope = self._rope(block)
            nodes = frozenset(map(block.name, block.quantized))
            streams = [
                (layer.output(x, swap, rope), alike)
                for x, places in streams
                for swap, alike in _alike(
                    [(place, walked[place].within(nodes, block.index)) for place in places]
                )
            ]
            if (
                len(walked) > len(swaps) and (block.index + 1) % every == 0
            ):  # the last one is as it is
                kept[block.index + 1] = next(x for x, places in streams if places[-1] == len(swaps))
            note = f"layer {block.index + 1} of {decoder.layers}, {len(streams)} streams"
            progress.advance(1, note)
        head = frozenset([decoder.head.name])
        states = {place: x[: len(self._tokens)] for x, places in streams for place in places}
        models: dict[int, tuple[Tensor, Function]] = {}
        for swap, alike in _alike([(place, swap.within(head)) for place, swap in enumerate(swaps)]):
            multiply = self._head(swap)
            models |= {place: (states[place], multiply) for place in alike}
        return self._compare([models[place] for place in range(len(swaps))])

    def _first_change(self, swap: Swap) -> int:
        """The first decoder layer that a change concerns; as many as there are where it is none."""
        decoder = self._quant.decoder
        changed = (
            block.index
            for block in decoder.blocks
            if swap.within(frozenset(map(block.name, block.sites)), block.index) != Swap()
        )
        return next(changed, decoder.layers)

    def _head(self, swap: Swap) -> Function:
        quant, decoder = self._quant, self._quant.decoder
        gain = _tensor(quant, decoder.head.norm.gain)
        if not decoder.head.quantized:
            table = _tensor(quant, f"{decoder.head_table()}.weight")
            return _head(decoder, gain, lambda x: F.linear(x, table))

        def floats() -> Weight:
            own, basis = self._checkpoint.decoder, self._basis
            table = basis.tensor(self._checkpoint, f"{own.head_table(basis.unties)}.weight")
            float_gain = basis.tensor(self._checkpoint, own.head.norm.gain)
            return table * _ratio(float_gain, gain), None

        return _head(decoder, gain, _node(quant, decoder.head.name, swap, floats))

    def _compare(self, models: Sequence[tuple[Tensor, Function]]) -> list[Quality]:
        """Models by what their final norm reads and the rest."""
        totals, truth = [Quality() for _ in models], self._truth.flatten(0, 1)
        targets = self._tokens[:, 1:].flatten()
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            reference = self._float_head(truth[piece]).log_softmax(-1)
            for (x, head), total in zip(models, totals, strict=True):
                found = head(x.flatten(0, 1)[piece]).log_softmax(-1)
                total.add(reference, found, targets[piece])
        return totals


def _alike(parts: Sequence[tuple[int, Swap]]) -> Iterator[tuple[Swap, list[int]]]:
    """Places by their equal changes, each once."""
    left = list(parts)
    while left:
        swap = left[0][1]
        yield swap, [place for place, other in left if other == swap]
        left = [(place, other) for place, other in left if other != swap]


def _tensor(quant: QuantModel, name: str) -> Tensor:
    return torch.from_numpy(quant.tensor(name).astype(np.float32))


def _head(decoder: Decoder, gain: Tensor, multiply: Function) -> Function:
    """From what the final norm reads, [..., hidden], to logits."""
    cap = decoder.head.softcap

    def logits(x: Tensor) -> Tensor:
        scores = multiply(PLAIN.norm(x, decoder.head.norm, gain))
        return scores if cap is None else PLAIN.softcap(scores, cap)

    return logits


class _Layer:
    """A decoder layer of the quantized model; its parts are made when a change asks for them.

    Args:
        judged: windows that are scored; those behind them are for calibration.
    """

    def __init__(
        self, quant: QuantModel, checkpoint: Checkpoint, basis: Basis, block: Block, judged: int
    ) -> None:
        self._quant, self._checkpoint, self._basis, self._block = quant, checkpoint, basis, block
        self._judged = judged
        self._gains = {name: _tensor(quant, block.name(name)) for name in block.floats}
        self._gains |= channel_orders(quant, block)
        self._kept: dict[str, Function] = {}  # nodes as they are
        self._floats: BlockWeights = {}

    def output(self, x: Tensor, swap: Swap, rope: Rope) -> Tensor:
        """The residual stream behind it, [n, L, hidden] -> the same."""
        made: dict[str, Function] = {}

        def node(name: str, value: Tensor) -> Tensor:
            if name not in made:
                made[name] = self._multiply(name, swap, value[self._judged :])
            return made[name](value)

        kept = self._block.index in swap.caches
        heads = cached_heads(FLOAT_BITS if kept else self._quant.scheme.kv_bits)
        return block_output(x, self._gains, node, self._block, rope, heads)

    def _multiply(self, name: str, swap: Swap, inputs: Tensor) -> Function:
        full, linears = self._block.name(name), self._block.sites[name].linears

        def floats() -> Weight:
            if not self._floats:
                job = self._quant, self._checkpoint, self._basis, self._block
                self._floats = float_block(*job)
            return site_weight(self._floats, linears)

        own = swap.within(frozenset([full]))
        if own != Swap():
            return _node(self._quant, full, own, floats, inputs)
        if name not in self._kept:
            self._kept[name] = _node(self._quant, full, own, floats)
        return self._kept[name]


def _node(
    quant: QuantModel,
    node: str,
    swap: Swap,
    floats: Callable[[], Weight],
    inputs: Tensor | None = None,
) -> Function:
    """How a GEMM node multiplies after a change, [..., K] -> [..., N].

    Args:
        floats: gives its float weights, where they are asked for.
        inputs: what it reads of the calibration's windows [m, L, K], if there are any.
    """
    scheme = swap.schemes.get(node, quant.scheme_of(node))
    whole = quant.fused(quant.decoder.members(node), node)
    if node in swap.schemes:
        whole = QuantLinear(node, scheme, _quantized(node, floats(), scheme, inputs))
    elif node in swap.weights | swap.activations:
        weight, bias = floats() if node in swap.weights else _values(whole)
        bits = FLOAT_BITS if node in swap.activations else scheme.abits
        return lambda x: F.linear(fake_quantize(x, bits, scheme.act_symmetric), weight, bias)
    quantizer = None
    if scheme.abits < FLOAT_BITS:
        quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric)
    return FakeQuantLinear(whole, quantizer, exact=False)


def _quantized(
    node: str, floats: Weight, scheme: QuantScheme, inputs: Tensor | None
) -> QuantArrays:
    """Float weights in a scheme: by GPTQ for these inputs, or to nearest without any."""
    weight, bias = floats
    if inputs is None or not inputs.numel():
        return quantize(weight.numpy(), None if bias is None else bias.numpy(), scheme)
    moments = Moments(weight.shape[1], cross=False)
    for window in fake_quantize(inputs, scheme.abits, scheme.act_symmetric):
        moments.add(window)
    solver = WeightSolver(CalibrationSettings(method=QqqSettings()), 0, gptq_rule)
    return solver.solve(node, weight, bias, scheme, moments)


def _values(linear: QuantLinear) -> Weight:
    """The weights that a linear's codes stand for, and its bias."""
    bias = linear.arrays.bias
    return torch.from_numpy(linear.dequantize()), None if bias is None else torch.tensor(bias)


# ---------------------------------------------------------------- float weights


def float_block(
    quant: QuantModel, checkpoint: Checkpoint, basis: Basis, block: Block
) -> BlockWeights:
    """A layer's float weights in the coordinates in which its nodes were quantized, by their names below
    its prefix: any of its nodes can take them while the others stay as they are.

    A recorded rotation is made again; nobody has changed a checkpoint whose codes were kept. What
    channel scales a method has folded into a norm shows in the norm's gain. Those between two linears
    come in pairs that cancel: what the rows of one lost the columns of the next have gained. Either
    follows from the codes by least squares, but a few levels shrink both, so the scale is the root of
    their ratio, in which that falls out. Scales between queries and keys cancel inside their node.
    """
    weights = basis.load(checkpoint, block.index)
    changed = {} if "kept" in quant.calibration else block.sites
    for node, site in changed.items():
        if isinstance(site.source, Norm):
            gain = _tensor(quant, block.name(site.source.gain))
            weights = fold_scales(weights, {node: _ratio(weights[site.source.gain], gain)}, block)
        elif site.source is not None and quant.calibration:
            scale = _paired_scale(quant, weights, block, site)
            weights = fold_scales(weights, {node: scale}, block)
    orders = channel_orders(quant, block)
    for node, step in block.orders.items():
        for name in block.sites[node].linears.names:
            weights[f"{name}.weight"] = weights[f"{name}.weight"][:, orders[step.name]]
    return weights


def _ratio(float_gain: Tensor, gain: Tensor) -> Tensor:
    """What columns behind a norm have gained; a channel that is off says nothing."""
    return torch.where(gain == 0, 1.0, float_gain / gain)


def _paired_scale(quant: QuantModel, weights: BlockWeights, block: Block, site: Site) -> Tensor:
    """The scales [K] of a site's input that is made by the rows of another linear."""
    assert site.source is not None
    found = _values(quant.fused([block.name(name) for name in site.linears.names], ""))[0]
    columns = _sums(found, site_weight(weights, site.linears)[0], 0)
    source = _values(quant.linear(block.name(site.source.name)))[0]
    rows = _sums(source, weights[f"{site.source.name}.weight"], 1)
    heads = block.heads
    if site.by_value_head:
        grouped = columns.view(2, heads.kv_heads, heads.groups, heads.head_dim)
        columns = grouped.sum(2).flatten(1)
    ratio = (columns[0] / columns[1]) / (rows[0] / rows[1])
    scale = torch.where(ratio.isfinite() & (ratio > 0), ratio.sqrt(), 1.0) * columns[0].sign()
    scale = torch.where(scale == 0, 1.0, scale).float()
    if site.by_value_head:
        shared = scale.view(heads.kv_heads, 1, heads.head_dim)
        scale = shared.expand(-1, heads.groups, -1).flatten()
    return scale


def _sums(found: Tensor, weight: Tensor, dim: int) -> Tensor:
    """[2, channels] fp64: the products of quantized and float weights, and the float ones' squares."""
    pairs = (found * weight, weight * weight)
    return torch.stack([pair.sum(dim, dtype=torch.float64) for pair in pairs])
