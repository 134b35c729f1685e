"""LLaMA 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna ...)."""

from __future__ import annotations

from calibration.families.base import LinearGroup, LinearSpec, ModelFamily

__all__ = ["FAMILY", "GROUPS", "LAYER_NORMS"]

GROUPS = (
    LinearGroup(
        "self_attn.qkv_proj",
        (
            LinearSpec("self_attn.q_proj", "q", "hidden", "attention_bias", "attn_q", rotary=True),
            LinearSpec("self_attn.k_proj", "kv", "hidden", "attention_bias", "attn_k", rotary=True),
            LinearSpec("self_attn.v_proj", "kv", "hidden", "attention_bias", "attn_v"),
        ),
        norm="input_layernorm",
    ),
    LinearGroup(
        "self_attn.o_proj",
        (LinearSpec("self_attn.o_proj", "hidden", "q", "attention_bias", "attn_output"),),
    ),
    LinearGroup(
        "mlp.gate_up_proj",
        (
            LinearSpec("mlp.gate_proj", "intermediate", "hidden", "mlp_bias", "ffn_gate"),
            LinearSpec("mlp.up_proj", "intermediate", "hidden", "mlp_bias", "ffn_up"),
        ),
        norm="post_attention_layernorm",
    ),
    LinearGroup(
        "mlp.down_proj",
        (LinearSpec("mlp.down_proj", "hidden", "intermediate", "mlp_bias", "ffn_down"),),
    ),
)
LAYER_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

FAMILY = ModelFamily("llama", "LlamaForCausalLM", "llama", "llama", GROUPS, LAYER_NORMS)
