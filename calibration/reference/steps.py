"""What each step of a decoder computes, in torch: one definition for calibration, training and the
reference.

`run` sends a value through steps. What differs between its callers is in a Context: how a GEMM node
multiplies (float or quantised), the gains, the positions, what a cache does to keys and values, and
the arithmetic: plain fp32, or wide with a rounding wherever the exported graph rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.families.steps import (
    Activate,
    Add,
    Attend,
    Experts,
    Gate,
    HeadNorm,
    Heads,
    Linear,
    Linears,
    Norm,
    Reorder,
    Step,
)
from calibration.families.steps import Rope as RopeStep
from calibration.reference.fake_quant import (
    FakeQuantize,
    fake_quantize,
    quantize_cache,
    round_to,
)

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = [
    "PLAIN",
    "STEPS",
    "Context",
    "HeadHook",
    "Plain",
    "Rope",
    "Rounded",
    "State",
    "attention_rows",
    "cached_heads",
    "rms_norm",
    "routed",
    "run",
    "visible",
]

Node = Callable[[str, Tensor], Tensor]  # (GEMM node, x [..., K]) -> [..., N]
Triple = tuple[Tensor, Tensor, Tensor]  # query [B, heads, S, d], key and value [B, kv_heads, T, d]
HeadHook = Callable[[Tensor, Tensor, Tensor], Triple]  # of rotated heads, before attention


def _as_they_are(query: Tensor, key: Tensor, value: Tensor) -> Triple:
    return query, key, value


def cached_heads(bits: int, quantize: FakeQuantize = fake_quantize) -> HeadHook:
    """Keys and values as a cache of these bits gives them back; 16 leaves them."""

    def heads(query: Tensor, key: Tensor, value: Tensor) -> Triple:
        return query, quantize_cache(key, bits, quantize), quantize_cache(value, bits, quantize)

    return heads


@dataclass(frozen=True)
class Rope:
    """cos and sin, fp32, of the positions that are computed: [L, width], or [B, 1, S, width] where
    each sequence has its own; width is as many channels of a head as turn.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        length: int,
        device: str | torch.device = "cpu",
        step: RopeStep | None = None,
        max_context: int | None = None,
    ) -> Rope:
        """Tables for windows of `length` tokens.

        Args:
            step: of a block; None, where it does not turn anything, is the first that there is.
            max_context: as CalibrationSettings'.
        """
        known = (block.rope for block in checkpoint.decoder.blocks)
        step = step or next((rope for rope in known if rope is not None), RopeStep())
        context = max_context or int(checkpoint.config.max_position_embeddings)
        frequencies, scaling = checkpoint.rope(step.frequencies(step.long(context)))
        positions = torch.arange(length, dtype=torch.float32)
        angles = positions[:, None] * torch.from_numpy(frequencies.copy())
        angles = torch.cat((angles, angles), -1).double()
        cos, sin = ((wave * scaling).float() for wave in (angles.cos(), angles.sin()))
        return cls(cos.to(device), sin.to(device))

    def rotate(self, x: Tensor) -> Tensor:
        """[..., L, head_dim] -> the same, pairs (i, i + width / 2) turned by their position's
        angle.
        """
        width = self.cos.shape[-1]
        turning, still = x[..., :width], x[..., width:]
        low, high = turning.chunk(2, -1)
        turned = turning * self.cos + torch.cat((-high, low), -1) * self.sin
        return torch.cat((turned, still), -1) if still.shape[-1] else turned


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query may look at by their positions: bool [len(queries), len(keys)].

    Args:
        queries, keys: positions in the cache, int64.
        window: as Attend's.
    """
    seen = keys <= queries[:, None]
    return seen if window is None else seen & (keys > queries[:, None] - window)


@dataclass(frozen=True)
class _Activation:
    """An activation in plain fp32, and as the graph's nodes compute it with a rounding behind
    each.
    """

    plain: Callable[[Tensor], Tensor]
    rounded: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


_ACTIVATIONS = {  # by the values of calibration.families.steps.ACTIVATIONS
    "silu": _Activation(  # a Sigmoid and a Mul
        F.silu, lambda x, rounded: rounded(x * rounded(torch.sigmoid(x.double())))
    ),
    "gelu_tanh": _Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x, rounded: rounded(F.gelu(x.double(), approximate="tanh")),
    ),
    "relu2": _Activation(  # a Relu, which is exact, and a Mul
        lambda x: F.relu(x).square(), lambda x, rounded: rounded(F.relu(x).square())
    ),
}


class Plain:
    """fp32 without roundings of its own, differentiable."""

    def round(self, x: Tensor) -> Tensor:
        """What an operator's result becomes."""
        return x

    def norm(self, x: Tensor, norm: Norm, gain: Tensor) -> Tensor:
        """RMSNorm over the last axis."""
        return rms_norm(x, gain, norm.epsilon)

    def activation(self, name: str, x: Tensor) -> Tensor:
        """A value of ACTIVATIONS."""
        return _ACTIVATIONS[name].plain(x)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, step: Attend, mask: Tensor | None
    ) -> Tensor:
        """Attention of heads of one number, [B, heads, S, d] -> the same.

        Args:
            mask: bool [..., S, T]; None is causal.
        """
        scale = None if step.scale == query.shape[-1] ** -0.5 else step.scale
        if step.softcap is None:
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=scale
            )
        scores = self.softcap(query @ key.transpose(-1, -2), step.softcap, step.scale)
        return _masked(scores, step, mask).softmax(-1) @ value

    def softcap(self, x: Tensor, cap: float, scale: float = 1.0) -> Tensor:
        """cap tanh(scale x / cap)."""
        return _cap(x * scale, cap)

    def scores(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of experts [..., E], by a router's weight [E, K]."""
        return F.linear(x, weight)


class Rounded(Plain):
    """The arithmetic of the exported graph: every operator's result rounded to the model's type.

    Norms, activations and attention compute in fp64, whose roundings to 16 bits are the same in
    every library: otherwise some activation codes move by a step, and a chaotic low-bit model
    drifts away from the exported one.

    Args:
        dtype: the model's.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def round(self, x: Tensor) -> Tensor:
        """To the model's type, in fp32."""
        return round_to(x, self._dtype)

    def norm(self, x: Tensor, norm: Norm, gain: Tensor) -> Tensor:
        """In fp64, rounded once; the epsilon as the ONNX attribute holds it."""
        wide, epsilon = x.double(), float(np.float32(norm.epsilon))
        mean = wide.square().mean(-1, keepdim=True)
        return self.round(wide * torch.rsqrt(mean + epsilon) * gain.double())

    def activation(self, name: str, x: Tensor) -> Tensor:
        """As the graph's nodes."""
        return _ACTIVATIONS[name].rounded(x, self.round)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, step: Attend, mask: Tensor | None
    ) -> Tensor:
        """In fp64, the scale as the ONNX attribute holds it, and rounded once; with a softcap scores
        and weights are rounded too, and what is between them is fp32.
        """
        query, key, value = (x.double() for x in (query, key, value))
        scale = float(np.float32(step.scale))
        if step.softcap is None:
            context = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=scale
            )
            return self.round(context)
        scores = self.round(query @ key.transpose(-1, -2))
        scores = self.softcap(scores, step.softcap, step.scale)
        weights = self.round(_masked(scores.double(), step, mask).softmax(-1))
        return self.round(weights.double() @ value)

    def scores(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rounded to fp32 whatever the model's type is: 16 bits would make ties."""
        return (x.double() @ weight.double().T).float()

    def softcap(self, x: Tensor, cap: float, scale: float = 1.0) -> Tensor:
        """Mul, Tanh and Mul, each rounded to fp32 whatever the model's type is."""
        ratio = np.float32(scale) / np.float32(cap)
        inner = torch.tanh((x.float() * ratio).double()).float()
        return inner * np.float32(cap)


PLAIN = Plain()


def _cap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


def _masked(scores: Tensor, step: Attend, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = _causal(scores.shape[-2], scores.shape[-1], step, scores.device)
    return scores.masked_fill(~mask, -torch.inf)


def _causal(queries: int, keys: int, step: Attend, device: torch.device) -> Tensor:
    positions = torch.arange(keys, device=device)
    return visible(positions[keys - queries :], positions, step.window)


@dataclass(frozen=True)
class Context:
    """What steps compute with.

    Attributes:
        gains: of norms, and weights of what else stays in floating point, by their names below the
            block's prefix; and the orders, int64, of channels.
        rope: positions.
        node: how a GEMM node multiplies.
        heads: what becomes of rotated heads before attention.
        arithmetic: Plain or Rounded.
        mask: of an attention's window, which keys each query may see; None, or where it gives
            None: causal from the first token on.
        tap: sees every value that the exported graph names by "norm" (what the norm in front of a
            node reads), "input" or "output" of a node, and gives what to go on with.
    """

    gains: Mapping[str, Tensor]
    rope: Rope
    node: Node | None = None
    heads: HeadHook = _as_they_are
    arithmetic: Plain = PLAIN
    mask: Callable[[int | None], Tensor | None] | None = None
    tap: Callable[[str, str, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class State:
    """What runs through the steps: the value, the residual stream, and heads while there are."""

    x: Tensor
    residual: Tensor
    heads: Triple | None = None


def _linears(step: Linears, state: State, context: Context) -> State:
    x = state.x if context.tap is None else context.tap("input", step.node, state.x)
    if step.floats:
        y = torch.cat([_product(member, x, context) for member in step.members], -1)
    else:
        assert context.node is not None
        y = context.node(step.node, x)
    return replace(state, x=y if context.tap is None else context.tap("output", step.node, y))


def _product(linear: Linear, x: Tensor, context: Context) -> Tensor:
    """A linear in floating point: a product and a sum, each rounded."""
    rounded, (weight, *bias) = context.arithmetic.round, linear.tensors()
    y = rounded(F.linear(x, context.gains[weight.name]))
    return rounded(y + context.gains[bias[0].name]) if bias else y


def _reorder(step: Reorder, state: State, context: Context) -> State:
    return replace(state, x=state.x[..., context.gains[step.name]])


def _norm(step: Norm, state: State, context: Context) -> State:
    x = state.x if context.tap is None else context.tap("norm", step.name, state.x)
    return replace(state, x=context.arithmetic.norm(x, step, context.gains[step.gain]))


def _heads(step: Heads, state: State, context: Context) -> State:
    stacked = state.x.unflatten(-1, (-1, step.head_dim)).transpose(-3, -2)
    query, key, value = stacked.split([step.heads, step.kv_heads, step.kv_heads], -3)
    return replace(state, heads=(query, key, value))


def _head_norm(step: HeadNorm, state: State, context: Context) -> State:
    def normed(x: Tensor, norm: Norm) -> Tensor:
        gain = context.gains[norm.gain]
        if norm.width == x.shape[-1]:
            return context.arithmetic.norm(x, norm, gain)
        rows = context.arithmetic.norm(x.transpose(-3, -2).flatten(-2), norm, gain)
        return rows.unflatten(-1, (-1, x.shape[-1])).transpose(-3, -2)

    query, key, value = _made(state)
    return replace(state, heads=(normed(query, step.query), normed(key, step.key), value))


def _rope(step: RopeStep, state: State, context: Context) -> State:
    query, key, value = _made(state)
    query, key = (context.arithmetic.round(context.rope.rotate(x)) for x in (query, key))
    return replace(state, heads=(query, key, value))


def _attend(step: Attend, state: State, context: Context) -> State:
    query, key, value = context.heads(*_made(state))
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    mask = None
    if context.mask is not None:
        mask = context.mask(step.window)
    elif step.window is not None and step.window < key.shape[-2]:
        mask = _causal(query.shape[-2], key.shape[-2], step, query.device)
    context_heads = context.arithmetic.attention(query, key, value, step, mask)
    return replace(state, x=context_heads.transpose(-3, -2).flatten(-2), heads=None)


def _gate(step: Gate, state: State, context: Context) -> State:
    gate, up = state.x.chunk(2, -1)
    arithmetic = context.arithmetic
    return replace(state, x=arithmetic.round(arithmetic.activation(step.activation, gate) * up))


def _activate(step: Activate, state: State, context: Context) -> State:
    return replace(state, x=context.arithmetic.activation(step.activation, state.x))


def routed(scores: Tensor, step: Experts) -> tuple[Tensor, Tensor]:
    """The experts of each token, int64 [..., top], and their weights, by scores fp32 [..., E]; of
    equal scores the first.
    """
    order = scores.argsort(stable=True, dim=-1, descending=True)[..., : step.top]
    best = scores.gather(-1, order)
    if step.normalized:
        return order, best.softmax(-1)
    return order, (best - scores.logsumexp(-1, keepdim=True)).exp()


def _experts(step: Experts, state: State, context: Context) -> State:
    """Every expert on its own tokens, [1, n, hidden]; one without tokens does nothing."""
    scores = context.arithmetic.scores(state.x, context.gains[step.weight])
    if context.tap is not None:
        scores = context.tap("output", step.router.name, scores)
    chosen, weights = (part.flatten(0, -2) for part in routed(scores, step))
    tokens = state.x.flatten(0, -2)
    made = tokens.new_zeros(*chosen.shape, tokens.shape[-1])  # [tokens, top, hidden]
    for index, member in enumerate(step.members):
        places = (chosen == index).nonzero(as_tuple=True)
        if len(places[0]):
            made[places] = run(member, tokens[None, places[0]], context).x[0]
    total = (made * weights[..., None]).sum(1)
    return replace(state, x=context.arithmetic.round(total).view_as(state.x))


def _add(step: Add, state: State, context: Context) -> State:
    x = state.x
    if step.multiplier != 1:
        x = context.arithmetic.round(x * step.multiplier)
    total = context.arithmetic.round(state.residual + x)
    return State(total, total)


def _made(state: State) -> Triple:
    assert state.heads is not None, "heads are cut before"
    return state.heads


STEPS: Mapping[type, Callable[[Any, State, Context], State]] = {
    Norm: _norm,
    Linears: _linears,
    Reorder: _reorder,
    Heads: _heads,
    HeadNorm: _head_norm,
    RopeStep: _rope,
    Attend: _attend,
    Gate: _gate,
    Activate: _activate,
    Experts: _experts,
    Add: _add,
}


def run(
    steps: Iterable[Step], x: Tensor, context: Context, residual: Tensor | None = None
) -> State:
    """Send a value through steps.

    Args:
        steps: of a block, in order.
        x: [B, L, ...], what the first step reads.
        context: what they compute with.
        residual: the residual stream; None is x.
    """
    state = State(x, x if residual is None else residual)
    for step in steps:
        state = STEPS[type(step)](step, state, context)
    return state


def attention_rows(query: Tensor, key: Tensor, rows: Tensor, step: Attend) -> Tensor:
    """log of the causal attention probabilities of some query positions.

    Args:
        query: [B, heads, L, d], rotated.
        key: [B, kv_heads, L, d], rotated.
        rows: query positions.
        step: the attention.

    Returns:
        [B, heads, len(rows), L], -inf where a query does not look.
    """
    groups = query.shape[-3] // key.shape[-3]
    key = key.repeat_interleave(groups, -3) if groups > 1 else key
    scores = query[..., rows, :] @ key.transpose(-1, -2) * step.scale
    if step.softcap is not None:
        scores = _cap(scores, step.softcap)
    seen = visible(rows, torch.arange(key.shape[-2], device=rows.device), step.window)
    return scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
