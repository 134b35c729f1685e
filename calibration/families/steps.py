"""The steps of a decoder block, as data: what each is called in a checkpoint and how it computes.

A block is a list of steps. A value runs through them; it starts as the residual stream, and again
after every Add, which adds it to the stream. What a step does stands once for torch, in
calibration/reference/steps.py, and once for ONNX, in exporter/graph/steps.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

__all__ = [
    "ACTIVATIONS",
    "ROPE_TYPES",
    "Activate",
    "Add",
    "Attend",
    "Experts",
    "Gate",
    "HeadNorm",
    "Heads",
    "Linear",
    "Linears",
    "Norm",
    "Packed",
    "Reorder",
    "Rope",
    "Step",
    "TensorInfo",
]

ACTIVATIONS = {  # Hugging Face's hidden_act: the name that steps use
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}

# Hugging Face's rope_type of frequencies that a context as long as the model was made for does not
# change ("dynamic" changes them beyond), or only once ("longrope").
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Packed:
    """Where transformers' own modules, and files that were saved as those are, hold a tensor.

    Attributes:
        name: of the tensor there.
        expert: the tensor is 3-D, and this is the place along its first axis; None: it is a matrix.
        start: the first row, of the matrix or of the expert's.
    """

    name: str
    expert: int | None = None
    start: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint.

    Attributes:
        name: in Hugging Face files.
        shape: there.
        gguf: its name in GGUF files, or ""; of an expert's, that of the experts' stacked ones.
        rotary: GGUF files hold its rows in RoPE's interleaved order.
        offset, factor: a step computes with factor * tensor + offset.
        whole: of a tensor that checkpoints hold within another one, the name of that.
        start: its first row there.
        packed: another place where checkpoints may hold it; None: there is none.
    """

    name: str
    shape: tuple[int, ...]
    gguf: str = ""
    rotary: bool = False
    offset: float = 0.0
    factor: float = 1.0
    whole: str = ""
    start: int = 0
    packed: Packed | None = None

    @property
    def stored(self) -> str:
        """The name of the tensor that checkpoints hold it in, its own if it stands for itself."""
        return self.whole or self.name

    @property
    def rows(self) -> slice:
        """Where it is in that."""
        return slice(self.start, self.start + self.shape[0])

    @property
    def module(self) -> str:
        """The name of the tensor that transformers' own modules hold it in."""
        return self.packed.name if self.packed else self.stored

    @property
    def place(self) -> slice | tuple[int, slice]:
        """Where it is in that."""
        if self.packed is None:
            return self.rows
        rows = slice(self.packed.start, self.packed.start + self.shape[0])
        return rows if self.packed.expert is None else (self.packed.expert, rows)

    @property
    def expert(self) -> int | None:
        """Which expert of its layer it belongs to; None of other tensors."""
        return self.packed.expert if self.packed else None

    @property
    def reach(self) -> tuple[int, ...]:
        """The shape of that tensor if this is its last part."""
        place = self.place
        before, rows = ((), place) if isinstance(place, slice) else ((place[0] + 1,), place[1])
        return (*before, rows.stop, *self.shape[1:])


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last axis, x / sqrt(mean(x^2) + epsilon) * gain.

    Attributes:
        name: below the block's prefix, such as "input_layernorm".
        width: of the axis.
        epsilon: under the root.
        gguf: its name below "blk.{i}." in GGUF files.
        offset, factor: the gain is factor * tensor + offset; an offset of 1 where the checkpoint
            stores gain - 1.
    """

    name: str
    width: int
    epsilon: float
    gguf: str = ""
    offset: float = 0.0
    factor: float = 1.0

    @property
    def gain(self) -> str:
        """Name of its tensor below the block's prefix."""
        return f"{self.name}.weight"

    def tensors(self) -> Iterator[TensorInfo]:
        """The gain."""
        gguf = f"{self.gguf}.weight" if self.gguf else ""
        yield TensorInfo(self.gain, (self.width,), gguf, offset=self.offset, factor=self.factor)


@dataclass(frozen=True)
class Linear:
    """One linear layer, weight [out_features, in_features].

    Attributes:
        name: below the block's prefix, such as "self_attn.q_proj".
        out_features, in_features: its sizes.
        bias: whether it has one.
        gguf: its name below "blk.{i}." in GGUF files.
        rotary: its rows are rotated by RoPE, which GGUF files store interleaved.
        packed: as TensorInfo's, below the block's prefix.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    gguf: str = ""
    rotary: bool = False
    packed: Packed | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def tensors(self) -> Iterator[TensorInfo]:
        """Weight, and bias if it has one."""
        for end, shape in (("weight", self.shape), ("bias", self.shape[:1])):
            if end == "weight" or self.bias:
                gguf = f"{self.gguf}.{end}" if self.gguf else ""
                yield TensorInfo(f"{self.name}.{end}", shape, gguf, self.rotary, packed=self.packed)


@dataclass(frozen=True)
class Linears:
    """Linears that read the same tensor and become one GEMM node, their outputs side by side.

    Attributes:
        node: name of the node below the block's prefix, such as "self_attn.qkv_proj".
        members: stacked in this order along the output.
        fused: checkpoints hold them so, in tensors of the node's name.
        gguf: the fused tensors' name below "blk.{i}." in GGUF files.
        floats: they stay in floating point, and are no GEMM node but a MatMul each. No family has
            it: a checkpoint that is quantized already may have left some out.
    """

    node: str
    members: tuple[Linear, ...]
    fused: bool = False
    gguf: str = ""
    floats: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(member.name for member in self.members)

    @property
    def out_features(self) -> int:
        """Of all members together."""
        return sum(member.out_features for member in self.members)

    @property
    def in_features(self) -> int:
        """Of every member."""
        return self.members[0].in_features

    @property
    def bias(self) -> bool:
        """Whether a member has a bias, and so the node."""
        return any(member.bias for member in self.members)

    def tensors(self) -> Iterator[TensorInfo]:
        """Those of every member, in order."""
        start = 0
        for member in self.members:
            for info in member.tensors():
                if self.fused:
                    end = info.name.rpartition(".")[2]
                    gguf = f"{self.gguf}.{end}" if self.gguf else ""
                    info = replace(info, whole=f"{self.node}.{end}", start=start, gguf=gguf)
                yield info
            start += member.out_features


@dataclass(frozen=True)
class Reorder:
    """Puts the channels of the next GEMM node's input into an order in which its groups lie together.

    No family has it: the codes of a checkpoint may ask for it (GPTQ's desc_act).

    Attributes:
        name: of the tensor below the block's prefix, whole numbers [width]: the channel that comes
            to each place.
        width: channels.
    """

    name: str
    width: int


@dataclass(frozen=True)
class Heads:
    """Cuts the stacked projections of queries, keys and values into heads.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values, each shared by heads / kv_heads query heads.
        head_dim: width of each.
    """

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of queries and of keys before RoPE.

    Attributes:
        query, key: the norms; their width is a head's, or that of all heads together.
    """

    query: Norm
    key: Norm


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of queries and keys, pairs (i, i + width / 2) of the first `width`
    channels of each head; the others stay.

    Attributes:
        width: of what turns; None is the whole head.
        table: the entry of the config's rope_parameters that its frequencies come from; "" where
            all layers share them.
        short: longrope: sequences of more positions than this have other frequencies; None: all
            have the same.
    """

    width: int | None = None
    table: str = ""
    short: int | None = None

    def long(self, context: int) -> bool:
        """Whether a context of so many positions has the frequencies of long ones."""
        return self.short is not None and context > self.short

    def frequencies(self, long: bool = False) -> str:
        """Name of a tensor of them, such as "rope.inv_freq"."""
        parts = ("rope", self.table, "long" if long else "", "inv_freq")
        return ".".join(part for part in parts if part)


@dataclass(frozen=True)
class Attend:
    """Causal attention over the KV cache, softmax(cap(scale q k^T)) v, and the heads side by side.

    Attributes:
        scale: of the scores.
        window: a query sees so many positions, itself included; None sees all.
        softcap: c in cap(x) = c tanh(x / c); None leaves scores as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Gate:
    """activation(gate) * up of the stacked pair (gate, up).

    Attributes:
        activation: a value of ACTIVATIONS.
    """

    activation: str


@dataclass(frozen=True)
class Activate:
    """activation(x).

    Attributes:
        activation: a value of ACTIVATIONS.
    """

    activation: str


@dataclass(frozen=True)
class Experts:
    """Sends each token through the few of many MLPs that a router gives the largest scores, and sums
    up what they make of it, weighted by the softmax of these scores.

    Attributes:
        router: makes the scores; it stays in floating point.
        members: the steps of each MLP, from the value that the router reads.
        top: how many a token goes through.
        normalized: the weights of a token sum to 1: the softmax is over its own scores, else over
            those of all experts.
    """

    router: Linear
    members: tuple[tuple[Linears | Reorder | Gate, ...], ...]
    top: int
    normalized: bool = True

    @property
    def weight(self) -> str:
        """Name of the router's tensor below the block's prefix."""
        return f"{self.router.name}.weight"


@dataclass(frozen=True)
class Add:
    """Adds the value to the residual stream.

    Attributes:
        multiplier: of the value.
    """

    multiplier: float = 1.0


Step = Norm | Linears | Reorder | Heads | HeadNorm | Rope | Attend | Gate | Activate | Experts | Add
