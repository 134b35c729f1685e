"""Gemma 2: gains stored as gain - 1, norms on both sides of attention and MLP, a scaled embedding,
softcaps, and a window in every other layer.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Embedding, Family, Head, UnsupportedError
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Rope, Step

__all__ = ["FAMILY"]


def norm(name: str, config: Config) -> Norm:
    """A norm of the residual stream's width."""
    return Norm(name, config.hidden, config.epsilon, offset=1.0)


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError("got use_bidirectional_attention true, expected causal attention")
    heads = config.heads
    bias = bool(config.get("attention_bias"))
    slides = config.values["layer_types"][index] == "sliding_attention"
    return (
        norm("input_layernorm", config),
        projections(config, bias),
        heads,
        Rope(),
        Attend(
            float(config.values["query_pre_attn_scalar"]) ** -0.5,
            window=config.get("sliding_window") if slides else None,
            softcap=config.get("attn_logit_softcapping"),
        ),
        output_projection(config, bias),
        norm("post_attention_layernorm", config),
        Add(),
        norm("pre_feedforward_layernorm", config),
        *gated_mlp(config),
        norm("post_feedforward_layernorm", config),
        Add(),
    )


def embedding(config: Config) -> Embedding:
    """Rows times the root of their width."""
    return Embedding(scale=config.hidden**0.5)


def head(config: Config) -> Head:
    """With a softcap."""
    return Head(
        norm("model.norm", config),
        tied=bool(config.get("tie_word_embeddings")),
        softcap=config.get("final_logit_softcapping"),
    )


FAMILY = Family("gemma2", "Gemma2ForCausalLM", "gemma2", block, embedding=embedding, head=head)
