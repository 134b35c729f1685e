"""The torch references: the float model, and the quantised model with the kernels' arithmetic."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.checkpoints.foreign import quiet_transformers, reason
from calibration.checkpoints.tensor_checks import same_numbers
from calibration.families.decoder import Block
from calibration.families.steps import Rope as RopeStep
from calibration.quant.scheme import FLOAT_BITS
from calibration.reference.fake_quant import (
    ActivationQuantizer,
    FakeQuantLinear,
    quantize_cache,
    round_to,
)
from calibration.reference.steps import Context, Plain, Rope, Rounded, run, visible
from plugins.errors import CheckError, InputError
from plugins.text import shown

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel

__all__ = [
    "CacheQuantizer",
    "Computed",
    "FloatReference",
    "QuantReference",
    "Reference",
    "Tap",
    "channel_orders",
    "float_model",
    "quantised_model",
]

Cache = Sequence[tuple[Tensor, Tensor]]  # keys and values [B, kv_heads, T, head_dim] of each layer
# (kind, name, value) -> the value to go on with. Kinds: "norm", "input" and "output" of the GEMM
# node or norm of that name, "key" (new keys after RoPE) and "layer" (the residual stream behind
# it) of the decoder layer of that number.
Tap = Callable[[str, str, Tensor], Tensor]


@dataclass(frozen=True)
class Computed:
    """What a reference computes in a call.

    Attributes:
        logits: [B, S, vocab] fp32.
        layers: the residual stream behind every decoder layer, [B, S, hidden] each.
        cache: of everything so far.
    """

    logits: Tensor
    layers: tuple[Tensor, ...]
    cache: Cache


class Reference(Protocol):
    """A decoder in torch.

    Attributes:
        context: most tokens of a sequence.
        vocab: rows of its head.
    """

    context: int
    vocab: int

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads, [B, S, hidden], of new sequences int64 [B, S]."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some of it, [..., hidden] -> [..., vocab]."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Computed:
        """Run tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, P + S], 0 is padding; None: all tokens are real.
            position_ids: [B, S]; None counts from the cache's end.
            cache: of the call before; None starts new sequences.
        """


def float_model(checkpoint: Checkpoint, max_context: int | None = None) -> Any:
    """The transformers model in fp32, eval mode: of a Hugging Face folder as transformers itself
    reads it, so that it shares no mistake of ours; of a GGUF file, or of one that is quantized
    already, with the checkpoint's tensors.

    Args:
        max_context: most tokens of a sequence of an export that it is compared with, whose rotary
            frequencies then count for shorter texts too; None: they are as long as they are.

    Raises:
        InputError: transformers does not load the folder, or would leave tensors of it out or make
            some up. CheckError: it reads other numbers than the checkpoint gave.
    """
    made = checkpoint.source.kind == "gguf" or checkpoint.format
    model = _from_tensors(checkpoint) if made else _own(checkpoint)
    if max_context is not None:
        _fix_frequencies(model, checkpoint, max_context)
    model.config.return_dict = True  # results are read by name, whatever a config says
    model.requires_grad_(False)
    return model.eval()


def _fix_frequencies(model: Any, checkpoint: Checkpoint, max_context: int) -> None:
    """Let short texts turn as an export does whose context goes beyond longrope's change."""
    for name, (step, long) in checkpoint.decoder.frequencies.items():
        if long and step.long(max_context):
            prefix = f"{step.table}_".lstrip("_")
            found = torch.from_numpy(np.array(checkpoint.rope(name)[0]))
            setattr(model.model.rotary_emb, f"{prefix}original_inv_freq", found)


def _own(checkpoint: Checkpoint) -> Any:
    """What transformers loads from the folder by itself, checked by its own report."""
    import transformers

    where = str(checkpoint.source.path)
    # Not the files': they have no part in the logits, and an attention may name a package.
    ours = {"generation_config": transformers.GenerationConfig(), "attn_implementation": None}
    try:
        with quiet_transformers():
            model, report = getattr(transformers, checkpoint.family.architecture).from_pretrained(
                where,
                dtype=torch.float32,
                key_mapping=dict(checkpoint.renaming) or None,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **ours,
            )
    except Exception as error:  # transformers raises many kinds
        raise InputError(
            where,
            f"got a model that transformers does not load ({reason(error)})",
            "Make the checkpoint again with save_pretrained",
        ) from None
    left = {kind: names for kind, names in report.items() if names}
    left["unexpected_keys"] = set(left.pop("unexpected_keys", ())) - set(checkpoint.inert)
    wrong = [f"{kind} {shown(min(map(str, names)))}" for kind, names in left.items() if names]
    if wrong:
        raise InputError(
            where,
            f"got weights that transformers does not all use ({', '.join(wrong)})",
            "Make the checkpoint again with save_pretrained",
        )
    _check_same(model, checkpoint)
    return model


def _check_same(model: Any, checkpoint: Checkpoint) -> None:
    """Hold what the quantised model is made of against what transformers read from the same files."""
    head = f"{checkpoint.decoder.head.name}.weight"
    table = f"{checkpoint.decoder.embedding.name}.weight"
    for name in {**checkpoint.decoder.shapes(), head: ()}:
        ours = checkpoint.stored(table if name == head and checkpoint.decoder.tied else name)
        info = checkpoint.decoder.infos.get(name)
        theirs = model.get_parameter(info.module if info else name).detach().numpy()
        if not same_numbers(theirs[info.place] if info else theirs, ours):
            raise _differs(checkpoint, f"tensor {name}")
    for name, (step, long) in checkpoint.decoder.frequencies.items():
        if not long:  # which transformers computes when it comes to them
            found = getattr(model.model.rotary_emb, f"{step.table}_inv_freq".lstrip("_")).numpy()
            if not same_numbers(found, checkpoint.rope(name)[0]):
                raise _differs(checkpoint, "the rotary frequencies")


def _differs(checkpoint: Checkpoint, what: str) -> CheckError:
    return CheckError(
        f"{checkpoint.source.path}, {what}",
        "got other numbers than transformers reads from the same files",
        "The quantised model was made of the wrong numbers: do not use it, and report this model",
    )


def _from_tensors(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint.config, dtype=torch.float32, trust_remote_code=False
        )
    state: dict[str, Tensor] = {}
    shapes = checkpoint.decoder.module_shapes()
    for info in checkpoint.decoder.tensors():
        part = torch.from_numpy(checkpoint.stored(info.name).astype(np.float32))
        if part.shape == shapes[info.module]:
            state[info.module] = part
            continue
        if info.module not in state:
            state[info.module] = torch.full(shapes[info.module], torch.nan)
        state[info.module][info.place] = part
    # The head of a tied model is absent from the state and shares the embedding afterwards.
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    head = f"{checkpoint.decoder.head.name}."
    left = [name for name in missing if not name.startswith(head)]
    if left or unexpected or any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError(f"model and tensors differ: {left[:3]} {unexpected[:3]}")
    rotary = model.model.rotary_emb
    for name, (step, long) in checkpoint.decoder.frequencies.items():
        found, scaling = checkpoint.rope(name)
        frequencies, prefix = torch.from_numpy(np.array(found)), f"{step.table}_".lstrip("_")
        if long:
            setattr(rotary, f"{prefix}long_inv_freq", frequencies)
            continue
        setattr(rotary, f"{prefix}inv_freq", frequencies)
        setattr(rotary, f"{prefix}original_inv_freq", frequencies.clone())
        setattr(rotary, f"{prefix}attention_scaling", scaling)
    _fill_buffers(model)
    return model


def _fill_buffers(model: Any) -> None:
    """Give the buffers that no checkpoint holds, such as Gemma's scale of the embedding, the values
    that transformers gives them; parameters stay.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            shape, dtype = getattr(module, name).shape, getattr(module, name).dtype
            module.register_buffer(name, torch.full(shape, torch.nan, dtype=dtype), False)
        if empty:
            model._init_weights(module)
        unknown = [name for name in empty if getattr(module, name).isnan().any()]
        if unknown:
            raise RuntimeError(f"no value for {unknown[0]} of {type(module).__name__}")


class _Given(torch.nn.Module):  # type: ignore[misc]
    """Stands for the decoder below a head, and gives what it is given."""

    def forward(self, inputs_embeds: Tensor, **others: Any) -> Any:
        """The decoder's result, with `inputs_embeds` as its last hidden state."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class FloatReference:
    """A transformers model: the truth that the declaration of its family is held against.

    Args:
        model: of float_model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._head = copy.copy(model)  # its own way from what the decoder gives to logits
        self._head._modules = {**model._modules, "model": _Given()}
        self.context = int(model.config.max_position_embeddings)
        self.vocab = int(model.config.vocab_size)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads, see Reference."""
        states: Tensor = self.model.model(input_ids, use_cache=False).last_hidden_state
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """See Reference."""
        logits: Tensor = self._head(
            input_ids=None, inputs_embeds=hidden.flatten(0, -2)[None]
        ).logits
        return logits.unflatten(1, hidden.shape[:-1])[0]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Computed:
        """Run tokens, see Reference."""
        from transformers import DynamicCache

        past = DynamicCache(config=self.model.config) if cache is None else cache.state
        layers: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:
            layers.append((output if isinstance(output, Tensor) else output[0]).clone())

        hooks = [layer.register_forward_hook(keep) for layer in self.model.model.layers]
        try:
            result = self.model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{_cache_argument(self.model): past},
                use_cache=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return Computed(result.logits.float(), tuple(layers), _HuggingFaceCache(past))


def _cache_argument(model: Any) -> str:
    """What forward() calls the cache: transformers renamed it in 5.24, and drops the old name."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class _HuggingFaceCache(Sequence[tuple[Tensor, Tensor]]):
    """transformers' cache, layer by layer."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __len__(self) -> int:
        return len(self.state.layers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        layer = self.state.layers[index]
        return layer.keys, layer.values


class CacheQuantizer:
    """New keys and values as a cache of few bits gives them back, rounded to the model's type."""

    def __init__(self, bits: int, dtype: str) -> None:
        self._bits, self._dtype = bits, dtype

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, S, head_dim] each, keys after RoPE -> the same."""
        if self._bits >= FLOAT_BITS:
            return key, value
        return round_to(quantize_cache(key, self._bits), self._dtype), round_to(
            quantize_cache(value, self._bits), self._dtype
        )


def channel_orders(quant: QuantModel, block: Block) -> dict[str, Tensor]:
    """The orders of a block's channels, int64, by their names below its prefix."""
    found = {step.name: quant.order(block.name(node)) for node, step in block.orders.items()}
    return {
        name: torch.from_numpy(order.astype(np.int64))
        for name, order in found.items()
        if order is not None
    }


def quantised_model(
    quant: QuantModel, round_activations: bool = True, max_context: int | None = None
) -> QuantReference:
    """The quantised model in torch.

    Args:
        quant: the quant folder.
        round_activations: round every operator's result to scheme.dtype, as the exported graph
            does; without, grouped linears may differ from it in fp32's last bits too, and are
            several times as fast.
        max_context: most tokens of a sequence, as in export_onnx; None, and at most, is the context
            that the model was made for.
    """
    return QuantReference(quant, round_activations, max_context)


class QuantReference:
    """The decoder's steps with the kernels' linears; a low-bit KV cache holds what it gives back.

    Args:
        quant, round_activations, max_context: see quantised_model.

    Attributes:
        context: most tokens of a sequence.
        vocab: rows of its head.
        linears: by their full names.
    """

    def __init__(
        self, quant: QuantModel, round_activations: bool, max_context: int | None = None
    ) -> None:
        self.decoder, self.vocab = quant.decoder, quant.decoder.vocab
        context = int(quant.config["max_position_embeddings"])
        self.context = min(max_context or context, context)
        self._dtype = quant.scheme.dtype if round_activations else "float32"
        self._arithmetic = Rounded(self._dtype) if round_activations else Plain()
        self._quantize = CacheQuantizer(quant.scheme.kv_bits, self._dtype)
        kinds = {
            (scheme.abits, scheme.act_symmetric) for scheme in quant.schemes if scheme.abits < 16
        }
        quantizers = {kind: ActivationQuantizer(*kind) for kind in kinds}
        self.linears: dict[str, FakeQuantLinear] = {}
        for name in self.decoder.linears:
            linear = quant.linear(name)
            quantizer = quantizers.get((linear.scheme.abits, linear.scheme.act_symmetric))
            self.linears[name] = FakeQuantLinear(
                linear, quantizer, self._dtype, exact=round_activations
            )

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(quant.tensor(name).astype(np.float32))

        head = self.decoder.head
        self._table = tensor(f"{self.decoder.embedding.name}.weight")
        self._head: Callable[[Tensor], Tensor]
        if head.quantized:
            self._head = self.linears[head.name]
        else:
            table = self._table if head.tied else tensor(f"{head.name}.weight")
            self._head = lambda x: self._arithmetic.round(F.linear(x, table))
        self._gain = tensor(head.norm.gain)
        self._gains = [
            {name: tensor(block.name(name)) for name in block.floats} | channel_orders(quant, block)
            for block in self.decoder.blocks
        ]
        self._ropes = {step: quant.rope(step, self.context) for step in self.decoder.ropes}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
    ) -> Computed:
        """Run tokens, see Reference.

        Args:
            tap: sees, and may change, what runs through.
        """
        x, layers, kept = self._run(input_ids, attention_mask, position_ids, cache, tap)
        norm, name = self.decoder.head.norm.name, self.decoder.head.name
        seen = tap or (lambda kind, name, value: value)
        scores = self._head(seen("input", name, self._normed(seen("norm", norm, x))))
        return Computed(self._capped(seen("output", name, scores)), tuple(layers), kept)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads, see Reference."""
        return self._normed(self._run(input_ids)[0])

    def head(self, hidden: Tensor) -> Tensor:
        """See Reference."""
        return self._capped(self._head(hidden))

    def _capped(self, scores: Tensor) -> Tensor:
        cap = self.decoder.head.softcap
        return scores if cap is None else self._arithmetic.softcap(scores, cap)

    def _normed(self, x: Tensor) -> Tensor:
        return self._arithmetic.norm(x, self.decoder.head.norm, self._gain)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The residual stream behind the last block, those behind all blocks, and the cache."""
        past = 0 if cache is None else cache[0][0].shape[2]
        total = past + input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, total).expand_as(input_ids)
        masks = _Masks(attention_mask, past, total)
        ropes: dict[RopeStep | None, Rope] = {None: Rope(torch.ones(0), torch.zeros(0))}
        ropes |= {step: self._rope(step, position_ids) for step in self._ropes}
        x = self._embedded(input_ids)
        layers, kept = list[Tensor](), list[tuple[Tensor, Tensor]]()
        for block in self.decoder.blocks:
            new: list[tuple[Tensor, Tensor]] = []
            context = Context(
                self._gains[block.index],
                ropes[block.rope],
                self._node(block),
                self._cached(block, None if cache is None else cache[block.index], new, tap),
                self._arithmetic,
                masks,
                None if tap is None else _below(tap, block),
            )
            x = run(block.steps, x, context).x
            layers.append(x)
            x = x if tap is None else tap("layer", str(block.index), x)
            kept += new
        return x, layers, kept

    def _embedded(self, input_ids: Tensor) -> Tensor:
        rows, scale = self._table[input_ids], self.decoder.embedding.scale
        if scale is None:
            return rows
        return self._arithmetic.round(rows * self._arithmetic.round(torch.tensor(scale)))

    def _rope(self, step: RopeStep, position_ids: Tensor) -> Rope:
        frequencies, scaling = self._ropes[step]
        angles = (position_ids[:, None, :, None].float() * torch.from_numpy(frequencies)).double()
        angles = torch.cat((angles, angles), -1)
        cos, sin = (wave * scaling for wave in (angles.cos(), angles.sin()))
        return Rope(round_to(cos, self._dtype), round_to(sin, self._dtype))

    def _node(self, block: Block) -> Callable[[str, Tensor], Tensor]:
        def node(name: str, x: Tensor) -> Tensor:
            members = block.sites[name].linears.names
            return torch.cat([self.linears[block.name(member)](x) for member in members], -1)

        return node

    def _cached(
        self,
        block: Block,
        old: tuple[Tensor, Tensor] | None,
        kept: list[tuple[Tensor, Tensor]],
        tap: Tap | None,
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        def heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if tap is not None:
                key = tap("key", str(block.index), key)
            key, value = self._quantize(key, value)
            if old is not None:
                key, value = torch.cat((old[0], key), 2), torch.cat((old[1], value), 2)
            kept.append((key, value))
            return query, key, value

        return heads


def _below(tap: Tap, block: Block) -> Tap:
    return lambda kind, name, x: tap(kind, block.name(name), x)


class _Masks:
    """Which keys each query may look at, by the window of its attention.

    A query always sees itself: a padding row would otherwise be all masked, and give NaN.

    Args:
        attention_mask: [B, total], or None.
        past, total: tokens in the cache before and after the call.
    """

    def __init__(self, attention_mask: Tensor | None, past: int, total: int) -> None:
        self._padding = None
        if attention_mask is not None and not bool((attention_mask > 0).all()):
            self._padding = attention_mask[:, None, None, :] > 0
        self._past, self._total = past, total
        self._made: dict[int | None, Tensor | None] = {}

    def __call__(self, window: int | None) -> Tensor | None:
        """bool [B or 1, 1, S, T]; None where causal attention from the first token on is meant."""
        if window not in self._made:
            self._made[window] = self._mask(window)
        return self._made[window]

    def _mask(self, window: int | None) -> Tensor | None:
        if window is not None and window >= self._total:
            return self(None)
        if self._padding is None and not self._past and window is None:
            return None
        keys = torch.arange(self._total)
        queries = keys[self._past :]
        seen = visible(queries, keys, window)[None, None]
        return seen if self._padding is None else seen & self._padding | (keys == queries[:, None])
