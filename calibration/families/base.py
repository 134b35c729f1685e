"""What a model family declares: its linear layers and how they fuse, its norms, its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["LinearGroup", "LinearSpec", "ModelDims", "ModelFamily"]


@dataclass(frozen=True)
class ModelDims:
    """Sizes that fix every tensor shape of a decoder.

    Attributes:
        hidden: width of the residual stream.
        q: num_attention_heads * head_dim.
        kv: num_key_value_heads * head_dim.
        intermediate: width of the MLP.
        vocab: rows of the embedding.
        layers: decoder layers.
        attention_bias, mlp_bias: whether those linears have a bias.
        tied: the head is the embedding.
    """

    hidden: int
    q: int
    kv: int
    intermediate: int
    vocab: int
    layers: int
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @classmethod
    def from_config(cls, config: Any) -> ModelDims:
        """The sizes in a Hugging Face config."""
        head_dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        return cls(
            int(config.hidden_size),
            int(config.num_attention_heads) * head_dim,
            int(config.num_key_value_heads) * head_dim,
            int(config.intermediate_size),
            int(config.vocab_size),
            int(config.num_hidden_layers),
            bool(getattr(config, "attention_bias", False)),
            bool(getattr(config, "mlp_bias", False)),
            bool(config.tie_word_embeddings),
        )


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a decoder layer: weight [out, in] with the sizes named as ModelDims
    fields.

    Attributes:
        name: name below the layer's prefix, such as "self_attn.q_proj".
        out_dim, in_dim: fields of ModelDims.
        bias_flag: the field of ModelDims that says whether it has a bias.
        gguf: its name below "blk.{i}." in a GGUF file.
        rotary: its rows are rotated by RoPE (GGUF files store such rows interleaved).
    """

    name: str
    out_dim: str
    in_dim: str
    bias_flag: str
    gguf: str
    rotary: bool = False


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same tensor and become one GEMM node.

    Attributes:
        node: name of the node below the layer's prefix, such as "self_attn.qkv_proj".
        members: the linears, stacked in this order along the output.
        norm: the RMSNorm whose output only they read, such as "input_layernorm", or "".
    """

    node: str
    members: tuple[LinearSpec, ...]
    norm: str = ""


def _no_objection(config: Any) -> str:
    return ""


@dataclass(frozen=True)
class ModelFamily:
    """A decoder-only architecture, as data.

    Attributes:
        name: key, equal to the file name.
        architecture: Hugging Face class.
        model_type: Hugging Face config type.
        gguf_architecture: value of general.architecture in GGUF files, or "" if this family does
            not read them.
        groups: linears of a decoder layer in execution order.
        layer_norms: {HF name: GGUF name} below the layer's prefix.
        objection: says why a config cannot be exported, or "".
        layer_prefix, embedding, final_norm, head: HF names, without ".weight".
    """

    name: str
    architecture: str
    model_type: str
    gguf_architecture: str
    groups: tuple[LinearGroup, ...]
    layer_norms: dict[str, str]
    objection: Callable[[Any], str] = _no_objection
    layer_prefix: str = "model.layers.{i}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear of a decoder layer, in order."""
        return tuple(member for group in self.groups for member in group.members)

    def layer(self, index: int) -> str:
        """Prefix of decoder layer `index`."""
        return self.layer_prefix.format(i=index)

    def nodes(self, layers: int) -> list[str]:
        """Every GEMM node of a model of so many decoder layers, in execution order."""
        return [
            f"{self.layer(index)}.{group.node}" for index in range(layers) for group in self.groups
        ]

    def node(self, name: str) -> str:
        """The GEMM node of a linear: ...self_attn.q_proj -> ...self_attn.qkv_proj; any other name
        stays.
        """
        for group in self.groups:
            for member in group.members:
                if name.endswith(f".{member.name}"):
                    return name.removesuffix(member.name) + group.node
        return name

    def members(self, node: str) -> tuple[str, ...]:
        """The linears of a GEMM node, in stacking order; of any other name itself."""
        for group in self.groups:
            if node.endswith(f".{group.node}"):
                return tuple(
                    node.removesuffix(group.node) + member.name for member in group.members
                )
        return (node,)

    def has_bias(self, linear: LinearSpec, dims: ModelDims) -> bool:
        """Whether this linear has a bias in a model of these sizes."""
        return bool(getattr(dims, linear.bias_flag))

    def linear_shape(self, linear: LinearSpec, dims: ModelDims) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(getattr(dims, linear.out_dim)), int(getattr(dims, linear.in_dim))

    def tensor_shapes(self, dims: ModelDims) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(HF name, shape) of every tensor a model of these sizes has, in execution order."""
        yield f"{self.embedding}.weight", (dims.vocab, dims.hidden)
        for index in range(dims.layers):
            prefix = self.layer(index)
            for norm in self.layer_norms:
                yield f"{prefix}.{norm}.weight", (dims.hidden,)
            for linear in self.linears():
                shape = self.linear_shape(linear, dims)
                yield f"{prefix}.{linear.name}.weight", shape
                if self.has_bias(linear, dims):
                    yield f"{prefix}.{linear.name}.bias", shape[:1]
        yield f"{self.final_norm}.weight", (dims.hidden,)
        if not dims.tied:
            yield f"{self.head}.weight", (dims.vocab, dims.hidden)
