"""Writes a quantised checkpoint as an ONNX decoder, layer by layer: no tracing, no torch,
deterministic names and bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from calibration.progress import NullProgress, Progress
from calibration.quant.scheme import FLOAT_BITS
from exporter.graph.nodes import NodeFactory
from exporter.graph.weights import ExternalWeights
from plugins import op_spec
from plugins.core.op_spec import is_custom

if TYPE_CHECKING:
    import onnx

    from calibration.quant.folder import QuantModel
    from calibration.quant.scheme import QuantLinear

__all__ = [
    "IR_VERSION",
    "OPSET",
    "export_onnx",
    "layer_output",
    "new_key",
]

OPSET = 23  # RMSNormalization, RotaryEmbedding and Attention are standard ops from here on
IR_VERSION = 11


def layer_output(index: int) -> str:
    """Name of the residual stream after decoder layer `index`, [B, S, hidden]."""
    return f"model.layers.{index}.output"


def new_key(index: int) -> str:
    """Name of decoder layer `index`'s new keys after RoPE, [B, kv_heads, S, head_dim]; a low-bit
    cache quantises them next.
    """
    return f"model.layers.{index}.self_attn.key"


@dataclass
class DecoderWriter:
    """Appends nodes and initializers of one decoder; every method returns the name of the tensor it
    made.
    """

    quant: QuantModel
    weights: ExternalWeights
    factory: NodeFactory
    dtype: int  # onnx.TensorProto.FLOAT16, BFLOAT16 or FLOAT
    fuse_norms: bool = True
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)
    linears: dict[str, QuantLinear] = field(
        default_factory=dict
    )  # of the layer being written, by node name
    norms: dict[str, str] = field(
        default_factory=dict
    )  # the same of the weights of the norms in front of them

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A standard node named after its single output."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def split(self, source: str, sizes: list[int], axis: int, outputs: list[str]) -> list[str]:
        """Split `source` along `axis` into pieces of the given sizes."""
        from onnx import helper

        self.nodes.append(
            helper.make_node(
                "Split",
                [source, self.ints("split", sizes)],
                outputs,
                name=f"{source}.split",
                axis=axis,
            )
        )
        return outputs

    def ints(self, prefix: str, values: list[int]) -> str:
        """A shared int64 constant vector."""
        import numpy as np

        name = f"{prefix}.{'_'.join(str(value) for value in values)}"
        if name not in self.weights:
            self.weights.add_inline(name, np.array(values, np.int64))
        return name

    def tensor(self, name: str) -> str:
        """A float tensor of the quantised folder, under its own name."""
        return self.weights.add(name, self.quant.tensor(name))

    def gemm(self, name: str, source: str) -> str:
        """The custom node of this layer's fused linears called `name`, with the norm in front of
        it: [B, S, K] -> [B, S, N].
        """
        from onnx import helper

        linear, epsilon = self.linears[name], float(self.quant.config["rms_norm_eps"])
        spec, attrs = op_spec(linear.scheme.op), linear.attributes
        packed = spec.pack(linear.arrays, attrs, name)
        names = [
            self.weights.add(f"{name}.{key}", packed[key]) for key in spec.input_names(attrs)[1:]
        ]
        norm = self.norms.get(name, "")
        if norm and self.fuse_norms and epsilon:  # a node takes an epsilon of 0 for no norm
            attrs = replace(attrs, norm_epsilon=epsilon)
            names.append(self.tensor(norm))  # gamma is the last input
        elif norm:
            source = self.norm(norm, source, norm.removesuffix(".weight"))
        output = f"{name}.output"
        self.nodes.append(self.factory.gemm(spec.name, attrs, name, [source, *names], output))
        self.infos.append(
            helper.make_tensor_value_info(output, self.dtype, ["B", "S", attrs.out_features])
        )
        return output

    def norm(self, name: str, source: str, output: str) -> str:
        """RMSNorm over the last axis, computed in fp32."""
        return self.node(
            "RMSNormalization",
            [source, self.tensor(name)],
            output,
            axis=-1,
            epsilon=float(self.quant.config["rms_norm_eps"]),
        )

    def attention_mask(self) -> str:
        """Boolean [B, 1, S, T], true where a query may look; T = P + S.

        A query always sees itself: a padding row would otherwise be all masked, give NaN, and spoil
        the cache.
        """
        self.node("Shape", ["attention_mask"], "mask.total", start=1, end=2)
        self.node("Shape", ["input_ids"], "mask.new", start=1, end=2)
        zero, one = self.scalar("mask.zero", 0), self.scalar("mask.one", 1)
        total = self.node("Squeeze", ["mask.total"], "mask.total_scalar")
        past = self.node(
            "Sub", [total, self.node("Squeeze", ["mask.new"], "mask.new_scalar")], "mask.past"
        )
        keys = self.node("Range", [zero, total, one], "mask.keys")
        queries = self.node("Range", [past, total, one], "mask.queries")
        column = self.node("Unsqueeze", [queries, self.ints("axes", [1])], "mask.query_column")
        causal = self.node("LessOrEqual", [keys, column], "mask.causal")
        itself = self.node("Equal", [keys, column], "mask.itself")
        valid = self.node("Cast", ["attention_mask"], "mask.valid", to=9)
        valid = self.node("Unsqueeze", [valid, self.ints("axes", [1, 2])], "mask.valid_4d")
        allowed = self.node("And", [causal, valid], "mask.allowed")
        return self.node("Or", [allowed, itself], "mask")

    def scalar(self, name: str, value: int) -> str:
        """An int64 scalar constant."""
        import numpy as np

        return self.weights.add_inline(name, np.array(value, np.int64))

    def rope_cache(self) -> tuple[str, str]:
        """cos and sin tables, [max positions, head_dim / 2]."""
        import numpy as np

        config = self.quant.config
        inv_freq = self.quant.tensor("rope.inv_freq").astype(np.float32)
        angles = (
            np.arange(config["max_position_embeddings"], dtype=np.float32)[:, None]
            * inv_freq[None, :]
        )
        wide, scaling = angles.astype(np.float64), float(config["rope_attention_scaling"])
        as_dtype = self.quant.tensor("model.norm.weight").dtype
        return (
            self.weights.add(
                "rope.cos", (np.cos(wide) * scaling).astype(np.float32).astype(as_dtype)
            ),
            self.weights.add(
                "rope.sin", (np.sin(wide) * scaling).astype(np.float32).astype(as_dtype)
            ),
        )

    def attention(self, index: int, source: str, mask: str, rope: tuple[str, str]) -> str:
        """Norm and attention block of one layer, KV cache by Concat; [B, S, hidden] -> [B, S,
        hidden].
        """
        config = self.quant.config
        heads, kv_heads, head_dim = (
            config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        prefix = f"model.layers.{index}.self_attn"
        qkv = self.gemm(f"{prefix}.qkv_proj", source)
        qkv = self.node(
            "Reshape",
            [qkv, self.ints("shape", [0, 0, heads + 2 * kv_heads, head_dim])],
            f"{prefix}.qkv_heads",
        )
        qkv = self.node("Transpose", [qkv], f"{prefix}.qkv", perm=[0, 2, 1, 3])
        qk, value = self.split(
            qkv, [heads + kv_heads, kv_heads], 1, [f"{prefix}.qk", f"{prefix}.value"]
        )
        qk = self.node(
            "RotaryEmbedding", [qk, *rope, "position_ids"], f"{prefix}.qk_rotated", interleaved=0
        )
        query, key = self.split(qk, [heads, kv_heads], 1, [f"{prefix}.query", new_key(index)])
        key, value = self.cached(prefix, key, value)
        present_key = self.node(
            "Concat", [f"past_key_values.{index}.key", key], f"present.{index}.key", axis=2
        )
        present_value = self.node(
            "Concat", [f"past_key_values.{index}.value", value], f"present.{index}.value", axis=2
        )
        out = self.node(
            "Attention",
            [query, present_key, present_value, mask],
            f"{prefix}.context_heads",
            scale=head_dim**-0.5,
        )
        out = self.node("Transpose", [out], f"{prefix}.context_rows", perm=[0, 2, 1, 3])
        out = self.node(
            "Reshape", [out, self.ints("shape", [0, 0, heads * head_dim])], f"{prefix}.context"
        )
        return self.gemm(f"{prefix}.o_proj", out)

    def cached(self, prefix: str, key: str, value: str) -> tuple[str, str]:
        """New keys and values as the cache holds them."""
        bits, outputs = (
            self.quant.scheme.kv_bits,
            [f"{prefix}.cached_key", f"{prefix}.cached_value"],
        )
        if bits == FLOAT_BITS:
            return key, value
        self.nodes.append(
            self.factory.cache(
                bits, self.quant.config["head_dim"], f"{prefix}.cache", [key, value], outputs
            )
        )
        return outputs[0], outputs[1]

    def mlp(self, index: int, source: str) -> str:
        """Norm and gated MLP of one layer, silu(gate) * up; [B, S, hidden] -> [B, S, hidden]."""
        prefix = f"model.layers.{index}.mlp"
        both = self.gemm(f"{prefix}.gate_up_proj", source)
        width = self.quant.config["intermediate_size"]
        gate, up = self.split(both, [width, width], -1, [f"{prefix}.gate", f"{prefix}.up"])
        gate = self.node(
            "Mul", [gate, self.node("Sigmoid", [gate], f"{prefix}.sigmoid")], f"{prefix}.silu"
        )
        return self.gemm(f"{prefix}.down_proj", self.node("Mul", [gate, up], f"{prefix}.product"))

    def layer(self, index: int, hidden: str, mask: str, rope: tuple[str, str]) -> str:
        """One decoder layer; [B, S, hidden] -> [B, S, hidden]."""
        from onnx import helper

        prefix = f"model.layers.{index}"
        self.linears = {linear.name: linear for linear in self.quant.groups(index)}
        self.norms = {
            f"{prefix}.{group.node}": f"{prefix}.{group.norm}.weight"
            for group in self.quant.family.groups
            if group.norm
        }
        hidden = self.node(
            "Add", [hidden, self.attention(index, hidden, mask, rope)], f"{prefix}.residual"
        )
        output = self.node("Add", [hidden, self.mlp(index, hidden)], layer_output(index))
        self.infos.append(
            helper.make_tensor_value_info(
                output, self.dtype, ["B", "S", self.quant.config["hidden_size"]]
            )
        )
        return output

    def head(self, hidden: str) -> str:
        """Final norm and the fp32 logits; a tied head reads the embedding's own initializer."""
        tied = self.quant.config["tie_word_embeddings"]
        table = "model.embed_tokens.weight" if tied else self.tensor("lm_head.weight")
        normed = self.norm("model.norm.weight", hidden, "model.norm")
        table = self.node("Transpose", [table], "lm_head.transposed", perm=[1, 0])
        scores = self.node("MatMul", [normed, table], "lm_head")
        return self.node("Cast", [scores], "logits", to=1)


def _graph_values(
    writer: DecoderWriter,
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Graph inputs and outputs, in the documented order."""
    from onnx import TensorProto, helper

    config, info = writer.quant.config, helper.make_tensor_value_info
    cache = [(i, kind) for i in range(config["num_hidden_layers"]) for kind in ("key", "value")]
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    inputs = [
        info("input_ids", TensorProto.INT64, ["B", "S"]),
        info("attention_mask", TensorProto.INT64, ["B", "T"]),
        info("position_ids", TensorProto.INT64, ["B", "S"]),
        *(
            info(f"past_key_values.{i}.{kind}", writer.dtype, ["B", kv_heads, "P", head_dim])
            for i, kind in cache
        ),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["B", "S", config["vocab_size"]]),
        *(
            info(f"present.{i}.{kind}", writer.dtype, ["B", kv_heads, "T", head_dim])
            for i, kind in cache
        ),
    ]
    return inputs, outputs


def export_onnx(
    quant: QuantModel, folder: Path, progress: Progress | None = None, fuse_norms: bool = True
) -> dict[str, Any]:
    """Write MODEL_FILE and DATA_FILE into `folder`; the graph's tensors are documented in
    docs/onnx.md.

    Memory stays at a few layers' weights: each layer is packed, appended to the data file and
    forgotten.

    Args:
        fuse_norms: make the norms before qkv_proj and gate_up_proj part of these nodes; else they
            are nodes of their own.

    Returns:
        Facts for the manifest: "summary" and the number of custom nodes.

    Raises:
        InputError: the quantised folder holds codes or shapes an op refuses.
    """
    import onnx
    from onnx import helper

    progress = progress or NullProgress()
    layers = quant.config["num_hidden_layers"]
    dtype = {
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
        "float32": onnx.TensorProto.FLOAT,
    }
    progress.start(ONNX, layers + 1)
    with ExternalWeights(folder / DATA_FILE) as weights:
        element = dtype[quant.scheme.dtype]
        writer = DecoderWriter(quant, weights, NodeFactory(element), element, fuse_norms)
        hidden = writer.node(
            "Gather",
            [writer.tensor("model.embed_tokens.weight"), "input_ids"],
            "model.embed_tokens",
        )
        mask, rope = writer.attention_mask(), writer.rope_cache()
        for index in range(layers):
            hidden = writer.layer(index, hidden, mask, rope)
            progress.advance(note=layer_output(index))
        writer.head(hidden)
        inputs, outputs = _graph_values(writer)
        graph = helper.make_graph(
            writer.nodes,
            "anybit_decoder",
            inputs,
            outputs,
            weights.initializers,
            value_info=writer.infos,
        )
        model = helper.make_model(
            graph,
            producer_name="anybit-trt",
            ir_version=IR_VERSION,
            functions=writer.factory.functions(),
            opset_imports=writer.factory.opset_imports(OPSET),
        )
        helper.set_model_props(
            model, {"anybit.scheme": quant.label, "anybit.method": quant.scheme.method}
        )
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    progress.advance(note="written")
    progress.finish()
    custom = Counter(node.op_type for node in writer.nodes if is_custom(node.domain))
    ops = " and ".join(f"{count} {op}" for op, count in custom.items())
    return {"summary": f"{ops} nodes, opset {OPSET}", "custom_nodes": custom.total()}
