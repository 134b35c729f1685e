"""Qwen3 (mixture of experts): the dense decoder with experts in the place of most MLPs."""

from __future__ import annotations

from typing import Any

from calibration.families.decoder import Config, Family, UnsupportedError
from calibration.families.parts import (
    gated_mlp,
    head_norms,
    output_projection,
    projections,
    routed_mlp,
)
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def routes(config: Config, index: int) -> bool:
    """Whether a layer has experts: each decoder_sparse_step-th one, those aside that
    mlp_only_layers names.

    Raises:
        UnsupportedError: that is no list of layers.
    """
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise UnsupportedError(f"got mlp_only_layers {dense}, expected a list of layers")
    return index not in dense and (index + 1) % config.size("decoder_sparse_step", 1) == 0


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    hidden, heads = config.hidden, config.heads
    bias = bool(config.get("attention_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias),
        heads,
        head_norms(config),
        config.rope(),
        Attend(heads.head_dim**-0.5, window=config.sliding_window),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *_mlp(config, index),
        Add(),
    )


def _mlp(config: Config, index: int) -> tuple[Step, ...]:
    if not routes(config, index):
        return gated_mlp(config)
    names, width = ("gate_proj", "up_proj", "down_proj"), config.size("moe_intermediate_size")
    return (routed_mlp(config, "mlp", names, width, bool(config.get("norm_topk_prob"))),)


def gguf_layers(config: Config) -> dict[str, Any]:
    """llama.cpp has experts in every layer, and their weights sum to 1."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    block,
    gguf="qwen3moe",
    gguf_fields={
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_used_count": "num_experts_per_tok",
    },
    gguf_required=("expert_count", "expert_feed_forward_length", "expert_used_count"),
    gguf_implied=gguf_layers,
    models="Qwen3, mixture of experts",
    aliases={
        "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
        "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
        "qwen3-coder-30b-a3b": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    },
)
