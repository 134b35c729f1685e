"""The torch references: the float model, and the quantised model with the kernels' arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.fake_quant import ActivationQuantizer, FakeQuantLinear, round_to

if TYPE_CHECKING:
    from calibration.checkpoint import Checkpoint
    from calibration.quant_folder import QuantModel

__all__ = ["float_model", "quantised_model"]


def float_model(checkpoint: Checkpoint) -> Any:
    """The transformers model in fp32, eval mode, as the checkpoint has it."""
    model = _empty_model(checkpoint.config)
    names = [name for name, _ in checkpoint.family.tensor_shapes(checkpoint.dims)]
    return _fill(model, {name: checkpoint.tensor(name) for name in names}, checkpoint.rope())


def quantised_model(quant: QuantModel, round_activations: bool = True) -> Any:
    """The transformers model with its linears replaced by FakeQuantLinear, fp32 arithmetic, eval mode.

    Args:
        quant: the quant folder.
        round_activations: round what flows between modules to scheme.dtype, as the exported graph does.
    """
    from transformers import AutoConfig

    hf = {key: value for key, value in quant.config["hf"].items() if key != "model_type"}
    model = _empty_model(AutoConfig.for_model(quant.family.model_type, **hf))
    scheme = quant.scheme
    dtype = scheme.dtype if round_activations else "float32"
    quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric) if scheme.abits < 16 else None
    state = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quant.has(f"{name}.codes"):
            model.set_submodule(name, FakeQuantLinear(quant.linear(name), quantizer, dtype))
    for name in model.state_dict():
        if quant.has(name):
            state[name] = torch.from_numpy(quant.tensor(name).astype(np.float32))
    state |= {name: value for name, value in model.state_dict().items() if not value.is_meta}
    rope = np.array(quant.tensor("rope.inv_freq")), float(quant.config["rope_attention_scaling"])
    model = _fill(model, state, rope)
    if dtype != "float32":
        _round_between_modules(model, dtype)
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


def _round_between_modules(model: Any, dtype: str) -> None:
    """Round norms' outputs, the inputs of o_proj and down_proj, both residual sums and the logits' input."""

    def round_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return round_to(output, dtype) if isinstance(output, Tensor) else output

    def round_input(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (round_to(arguments[0], dtype), *arguments[1:])

    def round_residual(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # In place: the decoder layer keeps this very tensor as its residual.
        arguments[0].copy_(round_to(arguments[0], dtype))

    inner = model.model
    _hook([inner.norm, *(norm for layer in inner.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm))],
          lambda module: module.register_forward_hook(round_output))
    _hook([part for layer in inner.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)],
          lambda module: module.register_forward_pre_hook(round_input))
    _hook([layer.post_attention_layernorm for layer in inner.layers],
          lambda module: module.register_forward_pre_hook(round_residual))
    _hook(list(inner.layers), lambda module: module.register_forward_hook(round_output))


def _hook(modules: list[nn.Module], register: Callable[[nn.Module], Any]) -> None:
    for module in modules:
        register(module)
