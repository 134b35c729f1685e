"""Which bits each GEMM node gets: one base scheme and the rules of a bits file over it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from calibration.families import Decoder
from calibration.quant.scheme import FLOAT_BITS, Bits, QuantScheme, check_abits, scheme_for
from plugins import op_spec, ranked_ops
from plugins.core.code_sets import parse_code_set
from plugins.errors import InputError

__all__ = [
    "Rule",
    "SchemeMap",
    "as_map",
    "check_head_bits",
    "head_scheme",
    "read_bits_file",
]

_LABEL = re.compile(r"w(\d+[b*]?)a(\d+)(?:-g(\d+))?", re.IGNORECASE)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?:.*\.)?{fnmatch.translate(pattern)}"
    )  # the whole name, or what follows one of its dots


@dataclass(frozen=True)
class Rule:
    """One line of a bits file.

    Attributes:
        pattern: shell pattern (* ? [0-9]) over full names, or over their ends after a dot:
            "down_proj", "layers.0.*".
        bits: as QuantScheme.label: w4a8, w4a8-g64, w2ba8; without -g the base's group size, -g0 is
            per output channel.
        where: file and line, for messages.
    """

    pattern: str
    bits: str
    where: str = field(default="a rule", compare=False)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a full name, such as model.layers.3.mlp.down_proj."""
        return _regex(self.pattern).fullmatch(name) is not None

    def scheme(self, base: QuantScheme) -> QuantScheme:
        """What it asks for over a base, whose method, symmetry, type and cache it keeps, and its op
        where that takes the bits.

        Raises:
            InputError: not the grammar above, bits out of range, or bits that no op takes.
        """
        found = _LABEL.fullmatch(self.bits)
        if found is None:
            raise InputError(
                self.where,
                f"got bits {self.bits!r}, expected w<W>a<A> or w<W>a<A>-g<G>, such as w4a8, "
                f"w2ba8-g64 or w8a16",
                "Write weight bits, activation bits (16 for weight-only) and, if you like, the group size",
            )
        wbits, abits, group = found.groups()
        bits = Bits(
            parse_code_set(wbits.lower(), self.where),
            check_abits(int(abits), self.where),
            base.group_size if group is None else int(group),
        )
        # A16 has no activation codes, so such a base says nothing of their symmetry.
        symmetric = base.act_symmetric if base.abits < 16 else None
        return scheme_for(
            bits,
            [op_spec(base.op), *ranked_ops()],
            symmetric,
            self.where,
            method=base.method,
            dtype=base.dtype,
            kv_bits=base.kv_bits,
        )


@dataclass(frozen=True)
class SchemeMap:
    """A scheme for every GEMM node: the last rule that matches, else the base.

    A rule matches a linear by its own name or by its node's (q_proj by "self_attn.qkv_proj"); the
    linears of a node, such as q, k and v, need one scheme. No rule is for the head.

    Attributes:
        base: of every node that no rule matches.
        rules: in order.
        head_bits: of the head's weights, see head_scheme; 16 leaves it in floating point.
        head_limit: the largest part by which a quantized head may raise perplexity, as
            calibration.blocks.head measures it; one that costs more stays in floating point. None:
            it is quantized whatever it costs.
        own: (node, scheme) of nodes whose codes are there already; before all rules.
        own_head: the same of the head, in the place of head_bits.
        floats: nodes that stay in floating point.
    """

    base: QuantScheme
    rules: tuple[Rule, ...] = ()
    head_bits: int = FLOAT_BITS
    head_limit: float | None = None
    own: tuple[tuple[str, QuantScheme], ...] = ()
    own_head: QuantScheme | None = None
    floats: tuple[str, ...] = ()

    @property
    def head(self) -> QuantScheme | None:
        """The head's scheme; None leaves it in floating point. Raises as head_scheme."""
        return self.own_head or head_scheme(self.head_bits, self.base)

    @cached_property
    def _own(self) -> Mapping[str, QuantScheme]:
        return dict(self.own)

    def decoder(self, decoder: Decoder) -> Decoder:
        """A float decoder as it is to become, its head quantized even where a limit may forbid it."""
        decoder = decoder.with_floats(self.floats)
        return decoder if self.head is None else decoder.with_quantized_head()

    def of(self, name: str, decoder: Decoder) -> QuantScheme:
        """The scheme of a node or linear by its full name.

        Raises:
            InputError: the rules give its node's linears different schemes.
        """
        node = decoder.node(name)
        if decoder.head.quantized and node == decoder.head.name:
            assert self.head is not None
            return self.head
        if node in self._own:
            return self._own[node]
        members = {member: self._last(node, member) for member in decoder.members(node)}
        schemes = {
            member: rule.scheme(self.base) if rule else self.base
            for member, rule in members.items()
        }
        if len(set(schemes.values())) > 1:
            got = ", ".join(
                f"{member.rpartition('.')[2]} {schemes[member].label} "
                f"({rule.where if rule else 'the base'})"
                for member, rule in members.items()
            )
            raise InputError(
                node,
                f"got {got}; expected one scheme, because these linears are one GEMM node",
                f"Name {node.rpartition('.')[2]} or every linear of it",
            )
        return next(iter(schemes.values()))

    def _last(self, node: str, member: str) -> Rule | None:
        return next(
            (rule for rule in reversed(self.rules) if rule.matches(node) or rule.matches(member)),
            None,
        )

    def nodes(self, decoder: Decoder) -> dict[str, QuantScheme]:
        """{node: scheme} of a model, in execution order.

        Raises:
            InputError: a pattern matches nothing in this model, or as `of`.
        """
        nodes = decoder.nodes
        inner = [node for node in nodes if node != decoder.head.name]
        names = list(
            dict.fromkeys(name for node in inner for name in (node, *decoder.members(node)))
        )
        first = decoder.blocks[0]
        for rule in self.rules:
            if not any(map(rule.matches, names)):
                raise InputError(
                    rule.where,
                    f"got pattern {rule.pattern!r}, which matches none of this model's linears, "
                    f"expected names "
                    f"as in {', '.join(map(first.name, first.sites))}; "
                    f"layers 0 to {decoder.layers - 1}",
                    "Check the spelling and the layer",
                )
        return {node: self.of(node, decoder) for node in nodes}

    def exceptions(self, decoder: Decoder) -> dict[str, QuantScheme]:
        """{node: scheme} of the nodes whose scheme is not the base. Raises as `nodes`."""
        schemes = self.nodes(decoder)
        return {node: scheme for node, scheme in schemes.items() if scheme != self.base}

    def linears(self, decoder: Decoder) -> dict[QuantScheme, dict[str, tuple[int, int]]]:
        """{scheme: {linear: its (out_features, in_features)}} of a model, by first use. Raises as
        `nodes`.
        """
        found: dict[QuantScheme, dict[str, tuple[int, int]]] = {}
        for node, scheme in self.nodes(decoder).items():
            for member in decoder.members(node):
                found.setdefault(scheme, {})[member] = decoder.linears[member].shape
        return found

    def weights(self, decoder: Decoder) -> dict[QuantScheme, int]:
        """{scheme: number of weights} of a model. Raises as `nodes`."""
        return {
            scheme: sum(rows * columns for rows, columns in shapes.values())
            for scheme, shapes in self.linears(decoder).items()
        }

    def schemes(self) -> tuple[QuantScheme, ...]:
        """Every scheme it can give, once: the base, then the rules' in order, the nodes' own, then
        the head's.
        """
        heads = () if self.head is None else (self.head,)
        rules = (rule.scheme(self.base) for rule in self.rules)
        return tuple(dict.fromkeys((self.base, *rules, *self._own.values(), *heads)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form; of a map without rules and without a head it is the base's."""
        rules = {"rules": [[rule.pattern, rule.bits] for rule in self.rules]} if self.rules else {}
        head = {} if self.head_bits == FLOAT_BITS else {"head_bits": self.head_bits}
        limit = {} if self.head_limit is None else {"head_limit": self.head_limit}
        own = {"own": {name: one.as_dict() for name, one in self.own}} if self.own else {}
        own_head = {} if self.own_head is None else {"own_head": self.own_head.as_dict()}
        floats = {"floats": list(self.floats)} if self.floats else {}
        return self.base.as_dict() | rules | head | limit | own | own_head | floats

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchemeMap:
        """Inverse of as_dict."""
        extra = {"rules", "head_bits", "head_limit", "own", "own_head", "floats"}
        base = QuantScheme(**{key: value for key, value in values.items() if key not in extra})
        head = values.get("own_head")
        return cls(
            base,
            tuple(Rule(pattern, bits) for pattern, bits in values.get("rules", [])),
            values.get("head_bits", FLOAT_BITS),
            values.get("head_limit"),
            tuple((node, QuantScheme(**own)) for node, own in values.get("own", {}).items()),
            None if head is None else QuantScheme(**head),
            tuple(values.get("floats", [])),
        )

    def as_text(self) -> str:
        """The rules as a bits file."""
        width = max((len(rule.pattern) for rule in self.rules), default=0)
        lines = [
            f"# Over a base of {self.base.model_label}; the last line that matches counts.",
            *(f"{rule.pattern:{width}} {rule.bits}" for rule in self.rules),
        ]
        return "\n".join(lines) + "\n"


def check_head_bits(text: str) -> int:
    """The number in --head-bits, if there is such a width.

    Raises:
        InputError: not 4..8 or 16.
    """
    known: dict[str, int] = {str(bits): bits for bits in (*range(4, 9), FLOAT_BITS)}
    if text not in known:
        raise InputError(
            "--head-bits",
            f"got {text!r}, expected auto, 4 to 8, or 16 for a head in floating point",
            "Give one of these",
        )
    return known[text]


def head_scheme(bits: int, base: QuantScheme) -> QuantScheme | None:
    """The head's scheme over a base: so many bits per weight; None of 16, which leave it as it is.

    Its activations have 8 bits, or 16 where the base's have: predictions suffer most from the last
    rounding. Fewer than 8 bits take the base's groups, 8 need none.

    Raises:
        InputError: not 4..8 or 16.
    """
    if check_head_bits(str(bits)) == FLOAT_BITS:
        return None
    group = base.group_size if bits < 8 else 0
    abits = 8 if base.abits < FLOAT_BITS else FLOAT_BITS
    return Rule("lm_head", f"w{bits}a{abits}-g{group}", "--head-bits").scheme(base)


def as_map(schemes: QuantScheme | SchemeMap) -> SchemeMap:
    """A single scheme as the map that gives it to every node."""
    return schemes if isinstance(schemes, SchemeMap) else SchemeMap(schemes)


def read_bits_file(path: Path, base: QuantScheme) -> SchemeMap:
    """The map of a bits file: one rule "PATTERN BITS" per line, "#" begins a comment.

    Raises:
        InputError: no such file, not text, no rule in it, or a line that is not a rule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "a file that is not UTF-8"
        raise InputError(
            "--bits-file", f"got {problem} for {path}, expected a text file", "Check the path"
        ) from None
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words, where = line.partition("#")[0].split(), f"{path}, line {number}"
        if words:
            if len(words) != 2:
                raise InputError(
                    where,
                    f"got {' '.join(words)!r}, expected a pattern and bits",
                    "Write a line such as: down_proj w8a8",
                )
            rules.append(Rule(words[0], words[1], where))
            rules[-1].scheme(base)
    if not rules:
        raise InputError(
            str(path),
            "got no rule, expected at least one line such as: down_proj w8a8",
            "Leave out --bits-file for the same bits everywhere",
        )
    return SchemeMap(base, tuple(rules))
