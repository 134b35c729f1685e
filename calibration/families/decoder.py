"""A decoder as data: what a family declares, and that declaration filled in from a model's config.

Every consumer iterates over the same steps: reading and checking tensors, calibration, rotation and
smoothing, training, sensitivity, the torch reference, the ONNX writer, the proof, and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from calibration.families.steps import (
    ACTIVATIONS,
    ROPE_TYPES,
    Add,
    Attend,
    Experts,
    Gate,
    HeadNorm,
    Heads,
    Linear,
    Linears,
    Norm,
    Reorder,
    Rope,
    Step,
    TensorInfo,
)

__all__ = [
    "Block",
    "Branch",
    "Config",
    "Decoder",
    "Embedding",
    "Family",
    "Head",
    "Site",
    "UnsupportedError",
]


class UnsupportedError(ValueError):
    """A config asks for something that no step can do; the message says which field."""


@dataclass(frozen=True)
class Config:
    """A Hugging Face config as plain JSON, with the sizes that families ask for.

    Attributes:
        values: the config's fields.
    """

    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A field; the default where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A field that counts something.

        Raises:
            UnsupportedError: it is missing, or no whole number above 0.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnsupportedError(f"got {name} {value}, expected a whole number above 0")
        return value

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size")

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return self.size("intermediate_size")

    @property
    def experts(self) -> int:
        """MLPs that a token is sent to some of, as transformers and as files call their number."""
        return self.size("num_local_experts", self.get("num_experts"))

    @property
    def experts_per_token(self) -> int:
        """How many it is sent to.

        Raises:
            UnsupportedError: more than there are.
        """
        chosen = self.size("num_experts_per_tok")
        if chosen > self.experts:
            raise UnsupportedError(
                f"got num_experts_per_tok {chosen}, expected at most the {self.experts} experts of a "
                "layer"
            )
        return chosen

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.size("num_hidden_layers")

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.size("vocab_size")

    def number(self, name: str) -> float:
        """A field that multiplies something.

        Raises:
            UnsupportedError: it is missing, or no number that fp32 computes with.
        """
        value = self.get(name)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (known and 1e-18 <= value <= 1e18):
            raise UnsupportedError(f"got {name} {value}, expected a number from 1e-18 to 1e18")
        return float(value)

    def cap(self, name: str) -> float | None:
        """A softcap; None where there is none."""
        return None if self.get(name) is None else self.number(name)

    @property
    def sliding_window(self) -> int | None:
        """Of attention; None sees all."""
        return None if self.get("sliding_window") is None else self.size("sliding_window")

    @property
    def epsilon(self) -> float:
        """Of the norms."""
        value = self.get("rms_norm_eps")
        if not isinstance(value, (int, float)) or value < 0:
            raise UnsupportedError(f"got rms_norm_eps {value}, expected a number of at least 0")
        return float(value)

    @property
    def heads(self) -> Heads:
        """Heads of queries, keys and values."""
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedError(
                f"got {heads} attention heads on {kv_heads} key-value heads, expected a multiple"
            )
        return Heads(heads, kv_heads, self.size("head_dim", self.hidden // heads))

    def rope(self, table: str = "", partial: bool = False) -> Rope:
        """How queries and keys turn.

        Args:
            table: the entry of rope_parameters, "" where it is one for all layers.
            partial: whether the family's attention can leave channels as they are.

        Raises:
            UnsupportedError: another kind of frequencies, or half of a pair.
        """
        found = self.get("rope_parameters", {})
        found = found.get(table) if table and isinstance(found, Mapping) else found
        if not isinstance(found, Mapping):
            raise UnsupportedError(f"got rope_parameters {found} for {table or 'all layers'}")
        kind, factor = found.get("rope_type", "default"), found.get("partial_rotary_factor") or 1.0
        if kind not in ROPE_TYPES:
            raise UnsupportedError(f"got rope_type {kind}, expected one of {', '.join(ROPE_TYPES)}")
        if float(factor) != 1.0 and not partial:
            raise UnsupportedError(
                f"got partial_rotary_factor {factor}, expected 1 (the whole head rotates)"
            )
        head_dim = self.heads.head_dim
        width = int(head_dim * float(factor))
        if not 0 < width <= head_dim or width % 2:
            raise UnsupportedError(
                f"got {width} of {head_dim} channels of a head that rotate, expected pairs"
            )
        short = Config(found).size("original_max_position_embeddings") if kind == "longrope" else 0
        return Rope(width if width < head_dim else None, table, short or None)

    def window(self, index: int) -> int | None:
        """Of the attention of a layer by its entry in layer_types; None sees all.

        Raises:
            UnsupportedError: an unknown entry.
        """
        kinds = self.get("layer_types")
        kind = kinds[index] if isinstance(kinds, list) and index < len(kinds) else None
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"got layer_types {kind} for layer {index}, expected full_attention or "
                f"sliding_attention"
            )
        return self.size("sliding_window") if kind == "sliding_attention" else None

    def activation(self, key: str = "hidden_act") -> str:
        """Of the MLP, as steps call it; `key` is the field that names it."""
        name = self.get(key, "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedError(f"got {key} {name}, expected one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


@dataclass(frozen=True)
class Embedding:
    """The table of tokens.

    Attributes:
        name: without ".weight".
        scale: of its rows; None leaves them.
        gguf: in GGUF files, without ".weight".
    """

    name: str = "model.embed_tokens"
    scale: float | None = None
    gguf: str = "token_embd"


@dataclass(frozen=True)
class Head:
    """What makes logits of the residual stream.

    Attributes:
        norm: the final norm, by its full name.
        name: of the table, without ".weight".
        tied: the table is the embedding's.
        softcap: c in c tanh(x / c) of the logits; None leaves them.
        gguf: of the table in GGUF files, without ".weight".
        quantized: it is a GEMM node, with codes of its own, and no float table.
    """

    norm: Norm
    name: str = "lm_head"
    tied: bool = False
    softcap: float | None = None
    gguf: str = "output"
    quantized: bool = False


@dataclass(frozen=True)
class Site:
    """A GEMM node and the steps that lead to it from the residual stream or from the node before.

    Attributes:
        linears: the node.
        lead: steps in front of it.
        before: the node before it in its branch, or None.
    """

    linears: Linears
    lead: tuple[Step, ...]
    before: Linears | None = None

    @cached_property
    def source(self) -> Norm | Linear | None:
        """What scales of the node's input channels can be folded into: the Norm right in front, the
        linear whose rows make these channels (values in front of attention, the up projection in
        front of a gate), or None.
        """
        if self.norm is not None:
            return self.norm
        if self.before is None or not self.lead:
            return None
        last = self.before.members[-1]
        if isinstance(self.lead[-1], Attend):
            heads = next(step for step in self.lead if isinstance(step, Heads))
            return last if last.out_features == heads.kv_heads * heads.head_dim else None
        if isinstance(self.lead[-1], Gate) and len(self.lead) == 1:
            return last if 2 * last.out_features == self.before.out_features else None
        return None

    @property
    def by_value_head(self) -> bool:
        """Whether its source makes values, each of which several query heads may read."""
        return self.attention and isinstance(self.source, Linear)

    @property
    def norm(self) -> Norm | None:
        """The norm right in front of the node, which becomes part of it."""
        last = self.lead[-1] if self.lead else None
        return last if isinstance(last, Norm) else None

    @property
    def attention(self) -> bool:
        """Whether it reads what attention makes."""
        return any(isinstance(step, Attend) for step in self.lead)


@dataclass(frozen=True)
class Branch:
    """The steps from the residual stream back to it.

    Attributes:
        chains: its GEMM nodes, each of which reads what the one before it makes: one chain, or one
            of every expert.
        tail: steps behind these up to the sum.
        add: the sum.
        lead: the steps in front of experts.
        experts: the step whose chains these are, or None.
    """

    chains: tuple[tuple[Site, ...], ...]
    tail: tuple[Step, ...]
    add: Add
    lead: tuple[Step, ...] = ()
    experts: Experts | None = None

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Its GEMM nodes in execution order."""
        return tuple(site for chain in self.chains for site in chain)

    @cached_property
    def norm(self) -> Norm | None:
        """The only step between the residual stream and what reads it; None: there is another."""
        lead = self.lead if self.experts else self.sites[0].lead
        first = lead[0] if len(lead) == 1 else None
        return first if isinstance(first, Norm) else None

    @cached_property
    def readers(self) -> tuple[Linear, ...]:
        """The linears that read the residual stream, a router among them."""
        router = (self.experts.router,) if self.experts else ()
        return (*router, *(one for chain in self.chains for one in chain[0].linears.members))

    @cached_property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that make what is added to it."""
        return tuple(one for chain in self.chains for one in chain[-1].linears.members)


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        index: of the layer.
        prefix: of its tensors' and nodes' names.
        steps: in execution order; the last one is an Add.
    """

    index: int
    prefix: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for branch in self.branches:  # a family file that makes no sense fails here, by name
            for site in branch.sites:
                self._check_widths(site)
            first, last = branch.sites[0].linears, branch.sites[-1].linears
            others = {one.in_features for one in branch.readers}
            others |= {one.out_features for one in branch.writers}
            if others != {first.in_features}:
                raise ValueError(f"{self.prefix}: {last.node} is not as wide as {first.node} reads")
            if branch.experts and branch is not self.branches[-1]:
                raise ValueError(f"{self.prefix}: expected experts in the last branch of the block")

    def _check_widths(self, site: Site) -> None:
        made = site.before.out_features if site.before is not None else 0
        for step in site.lead:
            if isinstance(step, Heads):
                wanted = (step.heads + 2 * step.kv_heads) * step.head_dim
                if made != wanted:
                    raise ValueError(
                        f"{self.prefix}: Heads cut {wanted} values, but get {made} of them"
                    )
                made = step.heads * step.head_dim
            elif isinstance(step, Gate):
                made //= 2
        if site.before is not None and made != site.linears.in_features:
            raise ValueError(
                f"{self.prefix}: {site.linears.node} reads {site.linears.in_features} values, but "
                f"gets {made}"
            )

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The steps cut at the sums."""
        found, steps = list[Branch](), list[Step]()
        for step in self.steps:
            if isinstance(step, Add):
                found.append(_branch(steps, step))
                steps = []
            else:
                steps.append(step)
        if steps or not found or not all(branch.sites for branch in found):
            raise ValueError(f"{self.prefix}: expected branches of linears that each end in an Add")
        return tuple(found)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The GEMM nodes by their names below the prefix, in execution order; those too that stay in
        floating point.
        """
        return {site.linears.node: site for branch in self.branches for site in branch.sites}

    @cached_property
    def quantized(self) -> dict[str, Site]:
        """Those of them that do not."""
        return {node: site for node, site in self.sites.items() if not site.linears.floats}

    @property
    def linears(self) -> Iterator[Linear]:
        """Every linear, in order."""
        return (linear for site in self.sites.values() for linear in site.linears.members)

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm, in order; those of heads too."""
        found = list[Norm]()
        for step in self.steps:
            if isinstance(step, Norm):
                found.append(step)
            elif isinstance(step, HeadNorm):
                found += (step.query, step.key)
        return tuple(found)

    @cached_property
    def floats(self) -> tuple[str, ...]:
        """Names of what stays in floating point: gains of norms, routers, and linears that do."""
        routers = (branch.experts.weight for branch in self.branches if branch.experts)
        linears = (site.linears for site in self.sites.values() if site.linears.floats)
        tensors = (info.name for step in linears for info in step.tensors())
        return (*(norm.gain for norm in self.norms), *routers, *tensors)

    @cached_property
    def heads(self) -> Heads:
        """How its attention cuts heads."""
        return next(step for step in self.steps if isinstance(step, Heads))

    @cached_property
    def attend(self) -> Attend:
        """Its attention."""
        return next(step for step in self.steps if isinstance(step, Attend))

    @cached_property
    def rope(self) -> Rope | None:
        """How it turns queries and keys; None where it does not."""
        return next((step for step in self.steps if isinstance(step, Rope)), None)

    @cached_property
    def before_attention(self) -> tuple[Step, ...]:
        """The steps that make the rotated heads of queries, keys and values."""
        return self.steps[: self.steps.index(self.attend)]

    def after(self, node: str) -> tuple[Step, ...]:
        """The steps that make the next node's input from this one's output; none for the last of
        a branch.
        """
        for branch in self.branches:
            for chain in branch.chains:
                for first, second in pairwise(chain):
                    if first.linears.node == node:
                        return second.lead
        return ()

    @cached_property
    def orders(self) -> dict[str, Reorder]:
        """{GEMM node below the prefix: the order of its input channels}, where it is not theirs."""
        lasts = ((node, site.lead[-1]) for node, site in self.sites.items() if site.lead)
        return {node: step for node, step in lasts if isinstance(step, Reorder)}

    def reordered(self, nodes: Collection[str]) -> Block:
        """The same block with a Reorder in front of these nodes, by their full names."""
        return self._changed(
            nodes, lambda step: (Reorder(f"{step.node}.order", step.in_features), step)
        )

    def with_floats(self, nodes: Collection[str]) -> Block:
        """The same block with these nodes in floating point, by their full names."""
        return self._changed(nodes, lambda step: (replace(step, floats=True),))

    def _changed(
        self, nodes: Collection[str], change: Callable[[Linears], tuple[Step, ...]]
    ) -> Block:
        """The same block with other steps in the place of these nodes, those of experts too."""

        def steps(old: Iterable[Step]) -> tuple[Any, ...]:
            found: list[Step] = []
            for step in old:
                if isinstance(step, Experts):
                    found.append(replace(step, members=tuple(map(steps, step.members))))
                elif isinstance(step, Linears) and self.name(step.node) in nodes:
                    found += change(step)
                else:
                    found.append(step)
            return tuple(found)

        return replace(self, steps=steps(self.steps))

    def name(self, name: str) -> str:
        """The full name of a tensor or node."""
        return f"{self.prefix}.{name}"

    def tensors(self) -> Iterator[TensorInfo]:
        """Its tensors by their full names: norms, routers, then linears, each in execution order."""
        routers = (branch.experts.router for branch in self.branches if branch.experts)
        nodes = (site.linears for site in self.sites.values())
        parts: list[Norm | Linear | Linears] = [*self.norms, *routers, *nodes]
        for part in parts:
            for info in part.tensors():
                gguf = f"blk.{self.index}.{info.gguf}" if info.gguf else ""
                whole = self.name(info.whole) if info.whole else ""
                packed = info.packed and replace(info.packed, name=self.name(info.packed.name))
                yield replace(
                    info, name=self.name(info.name), gguf=gguf, whole=whole, packed=packed
                )


def _chain(steps: Iterable[Step]) -> tuple[tuple[Site, ...], tuple[Step, ...]]:
    """The GEMM nodes among steps, and the steps behind the last of them."""
    sites, lead = list[Site](), list[Step]()
    for step in steps:
        if isinstance(step, Linears):
            sites.append(Site(step, tuple(lead), sites[-1].linears if sites else None))
            lead = []
        else:
            lead.append(step)
    return tuple(sites), tuple(lead)


def _branch(steps: Sequence[Step], add: Add) -> Branch:
    """The branch of these steps, which a sum ends."""
    place = next((place for place, step in enumerate(steps) if isinstance(step, Experts)), None)
    if place is None:
        sites, tail = _chain(steps)
        return Branch((sites,), tail, add)
    experts = steps[place]
    assert isinstance(experts, Experts)
    chains = tuple(_chain(member)[0] for member in experts.members)
    return Branch(chains, tuple(steps[place + 1 :]), add, tuple(steps[:place]), experts)


@dataclass(frozen=True)
class Decoder:
    """A family's decoder with a model's sizes.

    Attributes:
        config: the model's.
        embedding, blocks, head: in execution order.
    """

    config: Config
    embedding: Embedding
    blocks: tuple[Block, ...]
    head: Head

    def __post_init__(self) -> None:
        kinds = {block.heads for block in self.blocks}
        if len(kinds) > 1:
            raise UnsupportedError("got layers with different heads, expected the same in all")

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.blocks)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head.tied

    def head_table(self, unties: bool = False) -> str:
        """Whose table the head multiplies with, without ".weight": the embedding's where they are
        tied, unless a basis unties them.
        """
        return self.embedding.name if self.tied and not unties else self.head.name

    def untied(self) -> Decoder:
        """The same decoder with a head of its own."""
        return replace(self, head=replace(self.head, tied=False))

    def with_quantized_head(self) -> Decoder:
        """The same decoder with a head that is a GEMM node; the embedding keeps its own table."""
        return replace(self, head=replace(self.head, tied=False, quantized=True))

    def with_floats(self, nodes: Collection[str]) -> Decoder:
        """The same decoder with these GEMM nodes in floating point, by their full names."""
        blocks = tuple(block.with_floats(nodes) for block in self.blocks)
        return replace(self, blocks=blocks) if nodes else self

    @cached_property
    def floats(self) -> tuple[str, ...]:
        """The linears that stay in floating point, by their full names."""
        return tuple(
            self.full_name(node, name)
            for node, site in self.products.items()
            if site.linears.floats
            for name in site.linears.names
        )

    def reordered(self, nodes: Collection[str]) -> Decoder:
        """The same decoder with input channels of these GEMM nodes in orders of their own."""
        blocks = tuple(block.reordered(nodes) for block in self.blocks)
        return replace(self, blocks=blocks) if nodes else self

    @cached_property
    def orders(self) -> dict[str, tuple[str, int]]:
        """{GEMM node with such an order: its tensor, and how long that is}."""
        return {
            block.name(node): (block.name(step.name), step.width)
            for block in self.blocks
            for node, step in block.orders.items()
        }

    @property
    def head_site(self) -> Site:
        """The head as a GEMM node, whether it is to be one or not; it is named in full."""
        linear = Linear(self.head.name, self.vocab, self.hidden, gguf=self.head.gguf)
        return Site(Linears(self.head.name, (linear,)), (self.head.norm,))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Every GEMM node, in execution order."""
        return tuple(self.sites)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every GEMM node by its full name, in execution order."""
        return {name: site for name, site in self.products.items() if not site.linears.floats}

    @cached_property
    def products(self) -> dict[str, Site]:
        """The GEMM nodes, and between them those that stay in floating point."""
        found = {
            block.name(node): site for block in self.blocks for node, site in block.sites.items()
        }
        return found | {self.head.name: self.head_site} if self.head.quantized else found

    @cached_property
    def routers(self) -> dict[str, tuple[Block, Experts]]:
        """Every router by its full name, with its block and the experts that it chooses from."""
        return {
            block.name(branch.experts.router.name): (block, branch.experts)
            for block in self.blocks
            for branch in block.branches
            if branch.experts
        }

    @cached_property
    def routed(self) -> frozenset[str]:
        """The GEMM nodes of experts."""
        return frozenset(
            block.name(site.linears.node)
            for block in self.blocks
            for branch in block.branches
            if branch.experts
            for site in branch.sites
            if not site.linears.floats
        )

    @cached_property
    def path(self) -> frozenset[str]:
        """The GEMM nodes that one token goes through, with one expert of each layer for all."""
        found = {
            block.name(site.linears.node)
            for block in self.blocks
            for branch in block.branches
            for site in branch.chains[0]
            if not site.linears.floats
        }
        return frozenset(found | ({self.head.name} if self.head.quantized else set()))

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Every linear of a GEMM node by its full name."""
        return {
            member: linear
            for node, site in self.sites.items()
            for member, linear in zip(self.members(node), site.linears.members, strict=True)
        }

    @cached_property
    def _node_of(self) -> dict[str, str]:
        return {member: node for node in self.nodes for member in self.members(node)}

    def node(self, name: str) -> str:
        """The GEMM node of a linear: ...self_attn.q_proj -> ...self_attn.qkv_proj; another name
        stays.
        """
        return self._node_of.get(name, name)

    def members(self, node: str) -> tuple[str, ...]:
        """The linears of a GEMM node, in stacking order; of another name itself."""
        if node not in self.sites:
            return (node,)
        return tuple(self.full_name(node, name) for name in self.sites[node].linears.names)

    def full_name(self, node: str, name: str) -> str:
        """The full name of a tensor, norm or linear that the declaration of a GEMM node's layer
        names.
        """
        return node.removesuffix(self.products[node].linears.node) + name

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor of a checkpoint, in execution order."""
        table = (self.vocab, self.hidden)
        yield TensorInfo(f"{self.embedding.name}.weight", table, f"{self.embedding.gguf}.weight")
        for block in self.blocks:
            yield from block.tensors()
        yield from self.head.norm.tensors()
        if not self.head.tied:
            yield TensorInfo(f"{self.head.name}.weight", table, f"{self.head.gguf}.weight")

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, in execution order."""
        return {info.name: info for info in self.tensors()}

    @cached_property
    def fused(self) -> tuple[str, ...]:
        """Tensors of a checkpoint that hold those of several linears."""
        return tuple(dict.fromkeys(info.whole for info in self.tensors() if info.whole))

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor as checkpoints have them, in execution order."""
        return {info.stored: (info.rows.stop, *info.shape[1:]) for info in self.tensors()}

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor as transformers' own modules have them, in execution order."""
        return {info.module: info.reach for info in self.tensors()}

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """How queries and keys turn in some layer, each way once."""
        return tuple(dict.fromkeys(block.rope for block in self.blocks if block.rope is not None))

    @cached_property
    def frequencies(self) -> dict[str, tuple[Rope, bool]]:
        """{name of a tensor of rotary frequencies: whose they are, and whether of long contexts}."""
        return {
            rope.frequencies(long): (rope, long)
            for rope in self.ropes
            for long in ((False, True) if rope.short is not None else (False,))
        }

    def rotated(self, rope: Rope) -> int:
        """Channels of a head that turn."""
        return rope.width or self.blocks[0].heads.head_dim

    def declaration(self) -> str:
        """All that its family says of it, as text: two decoders of one text compute the same."""
        return repr((self.embedding, self.blocks, self.head))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor, in execution order."""
        return {info.name: info.shape for info in self.tensors()}


def _no_objection(config: Any) -> str:
    return ""


def _nothing_implied(config: Any) -> Mapping[str, Any]:
    return {}


def _plain_embedding(config: Config) -> Embedding:
    return Embedding()


def _plain_head(config: Config) -> Head:
    norm = Norm("model.norm", config.hidden, config.epsilon, "output_norm")
    return Head(norm, tied=bool(config.get("tie_word_embeddings", False)))


@dataclass(frozen=True)
class Family:
    """An architecture of decoder-only models, as data.

    Attributes:
        name: key, equal to the file's name.
        architecture: Hugging Face class.
        model_type: Hugging Face config type.
        block: the steps of a layer from a model's config and the layer's index; raises
            UnsupportedError where no step can do what the config says.
        gguf: value of general.architecture in GGUF files, or "" if they are not read; for families
            whose config LLaMA's fields describe, see calibration/checkpoints/gguf.py.
        gguf_fields: {key below the architecture's name in GGUF files: the config's field}, beside
            those that every family has.
        gguf_required: such keys that a file must have.
        gguf_implied: fields that such files leave to the architecture, from the other ones.
        objection: says why a transformers config cannot be exported, or "".
        embedding, head: of a model's config.
        prefix: of a layer's tensors.
        models: what it reads, for people.
        aliases: {short name: the hub id that it stands for}.
        own_code: what auto_map in a config may name, since it is what transformers' classes were
            made from.
    """

    name: str
    architecture: str
    model_type: str
    block: Callable[[Config, int], tuple[Step, ...]]
    gguf: str = ""
    gguf_fields: Mapping[str, str] = field(default_factory=dict)
    gguf_required: tuple[str, ...] = ()
    gguf_implied: Callable[[Config], Mapping[str, Any]] = _nothing_implied
    objection: Callable[[Any], str] = _no_objection
    embedding: Callable[[Config], Embedding] = _plain_embedding
    head: Callable[[Config], Head] = _plain_head
    prefix: str = "model.layers.{i}"
    models: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    own_code: tuple[str, ...] = ()

    def decoder(self, values: Mapping[str, Any]) -> Decoder:
        """The decoder of a model.

        Args:
            values: its Hugging Face config as plain JSON.

        Raises:
            UnsupportedError: a field that no step can follow.
        """
        config = Config(values)
        blocks = (
            Block(index, self.prefix.format(i=index), self.block(config, index))
            for index in range(config.layers)
        )
        return Decoder(config, self.embedding(config), tuple(blocks), self.head(config))
