"""LLaMA 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna ...)."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY", "block"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias, rotary=True),
        heads,
        config.rope(),
        Attend(scale=heads.head_dim**-0.5),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *gated_mlp(config, mlp_bias),
        Add(),
    )


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    block,
    gguf="llama",
    models="LLaMA 1 to 3 and what has its architecture (SmolLM2, TinyLlama, Vicuna ...)",
    aliases={
        "llama-7b": "huggyllama/llama-7b",
        "llama-13b": "huggyllama/llama-13b",
        "llama-30b": "huggyllama/llama-30b",
        "llama-65b": "huggyllama/llama-65b",
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-2-13b": "meta-llama/Llama-2-13b-hf",
        "llama-2-70b": "meta-llama/Llama-2-70b-hf",
        "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
        "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
        "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
        "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
        "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
        "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
        "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    },
)
