"""The torch references: the float model, and the quantised model with the kernels' arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.quant.scheme import FLOAT_BITS
from calibration.reference.fake_quant import (
    ActivationQuantizer,
    FakeQuantLinear,
    quantize_cache,
    round_to,
)

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel

__all__ = ["CacheQuantizer", "float_model", "quantised_model"]


def float_model(checkpoint: Checkpoint) -> Any:
    """The transformers model in fp32, eval mode, as the checkpoint has it."""
    model = _empty_model(checkpoint.config)
    names = [name for name, _ in checkpoint.family.tensor_shapes(checkpoint.dims)]
    return _fill(model, {name: checkpoint.tensor(name) for name in names}, checkpoint.rope())


def quantised_model(quant: QuantModel, round_activations: bool = True) -> Any:
    """The transformers model with its linears replaced by FakeQuantLinear, fp32 arithmetic, eval
    mode.

    A low-bit KV cache is each attention's `cache_quantizer`; the cache then holds what it gives
    back.

    Args:
        quant: the quant folder.
        round_activations: round what flows between modules to scheme.dtype, as the exported graph
            does; without, grouped linears may differ from it in fp32's last bits too, and are
            several times as fast.
    """
    from transformers import AutoConfig

    hf = {key: value for key, value in quant.config["hf"].items() if key != "model_type"}
    model = _empty_model(AutoConfig.for_model(quant.family.model_type, **hf))
    dtype = quant.scheme.dtype if round_activations else "float32"
    kinds = {(scheme.abits, scheme.act_symmetric) for scheme in quant.schemes if scheme.abits < 16}
    quantizers = {kind: ActivationQuantizer(*kind) for kind in kinds}
    state = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quant.has(f"{name}.codes"):
            linear = quant.linear(name)
            quantizer = quantizers.get((linear.scheme.abits, linear.scheme.act_symmetric))
            model.set_submodule(
                name, FakeQuantLinear(linear, quantizer, dtype, exact=round_activations)
            )
    for name in model.state_dict():
        if quant.has(name):
            state[name] = torch.from_numpy(quant.tensor(name).astype(np.float32))
    state |= {name: value for name, value in model.state_dict().items() if not value.is_meta}
    rope = np.array(quant.tensor("rope.inv_freq")), float(quant.config["rope_attention_scaling"])
    model = _fill(model, state, rope)
    if quant.scheme.kv_bits < FLOAT_BITS:
        for layer in model.model.layers:
            layer.self_attn.cache_quantizer = CacheQuantizer(quant.scheme.kv_bits, dtype)
        _use_attention(model, dtype, torch.float32)
    if round_activations:
        _round_every_op(model, dtype)
    return model


def _empty_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _fill(model: Any, state: dict[str, Tensor], rope: tuple[np.ndarray, float]) -> Any:
    # The head of a tied model is absent from the state and shares the embedding afterwards.
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name in missing if not name.startswith("lm_head.")]
    if left or unexpected or any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError(f"model and tensors differ: {left[:3]} {unexpected[:3]}")
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.from_numpy(np.array(rope[0], np.float32))
    rotary.original_inv_freq = rotary.inv_freq.clone()
    rotary.attention_scaling = rope[1]
    model.requires_grad_(False)
    return model.eval()


def _round_every_op(model: Any, dtype: str) -> None:
    """Round the result of every operator of the exported graph that HF computes between linears,
    each where the graph does.

    FakeQuantLinear rounds its own output. Norms, sigmoid and attention compute in fp64, whose
    roundings to 16 bits are the same in every library: otherwise some activation codes move by a
    step, and a chaotic low-bit model drifts away from the exported one.
    """

    def round_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return round_to(output, dtype) if isinstance(output, Tensor) else output

    def round_input(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (round_to(arguments[0], dtype), *arguments[1:])

    def round_residual(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # In place: the decoder layer keeps this very tensor as its residual.
        arguments[0].copy_(round_to(arguments[0], dtype))

    inner = model.model
    layers = list(inner.layers)
    inner.norm = _RoundedNorm(inner.norm, dtype)
    inner.rotary_emb = _RoundedRotary(inner.rotary_emb, dtype)
    for module in (model.lm_head, *layers):
        module.register_forward_hook(round_output)
    for layer in layers:
        layer.input_layernorm = _RoundedNorm(layer.input_layernorm, dtype)
        layer.post_attention_layernorm = _RoundedNorm(layer.post_attention_layernorm, dtype)
        layer.post_attention_layernorm.register_forward_pre_hook(round_residual)
        layer.mlp.down_proj.register_forward_pre_hook(round_input)  # silu(gate) * up
        layer.mlp.act_fn = _RoundedSilu(dtype)
    _use_attention(model, dtype, torch.float64)


class _RoundedNorm(nn.Module):  # type: ignore[misc]
    """RMSNorm in fp64, rounded once."""

    weight: Tensor

    def __init__(self, norm: nn.Module, dtype: str) -> None:
        super().__init__()
        self.weight = norm.weight
        self._epsilon = float(np.float32(norm.variance_epsilon))  # as the ONNX attribute holds it
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        wide = x.double()
        y = (
            wide
            * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)
            * self.weight.double()
        )
        return round_to(y, self._dtype)


class _RoundedRotary(nn.Module):  # type: ignore[misc]
    """cos and sin of fp32 angles in fp64, rounded once, as the tables of the graph."""

    def __init__(self, rotary: nn.Module, dtype: str) -> None:
        super().__init__()
        self._inv_freq, self._scaling, self._dtype = (
            rotary.inv_freq,
            rotary.attention_scaling,
            dtype,
        )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, head_dim] of positions [B, S]."""
        angles = (position_ids[..., None].float() * self._inv_freq).double()
        angles = torch.cat((angles, angles), -1)
        return round_to(angles.cos() * self._scaling, self._dtype), round_to(
            angles.sin() * self._scaling, self._dtype
        )


class _RoundedSilu(nn.Module):  # type: ignore[misc]
    """silu as the graph computes it: Sigmoid, then Mul."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return round_to(x * round_to(torch.sigmoid(x.double()), self._dtype), self._dtype)


class CacheQuantizer(nn.Module):  # type: ignore[misc]
    """New keys and values as a cache of few bits gives them back, rounded to the model's type."""

    def __init__(self, bits: int, dtype: str) -> None:
        super().__init__()
        self._bits, self._dtype = bits, dtype

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, S, head_dim] each, keys after RoPE -> the same."""
        return round_to(quantize_cache(key, self._bits), self._dtype), round_to(
            quantize_cache(value, self._bits), self._dtype
        )


def _use_attention(model: Any, dtype: str, wide: torch.dtype) -> None:
    """Attention in `wide` on rounded rotated queries and keys, its result rounded; a
    `cache_quantizer` sees new keys and values first.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **options: Any,
    ) -> Any:
        if hasattr(module, "cache_quantizer"):
            # In place: the cache holds these very tensors. What was in it before went through here
            # then.
            new = key[..., -query.shape[-2] :, :], value[..., -query.shape[-2] :, :]
            for part, cached in zip(
                new, module.cache_quantizer(round_to(new[0], dtype), new[1]), strict=True
            ):
                part.copy_(cached)
        rotated = round_to(query, dtype).to(wide), round_to(key, dtype).to(wide)
        scale = float(np.float32(scaling))  # as the ONNX attribute holds it
        context, weights = sdpa_attention_forward(
            module, *rotated, value.to(wide), mask, scaling=scale, **options
        )
        return round_to(context, dtype), weights

    name = f"anybit_{dtype}_{wide}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
