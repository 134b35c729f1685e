"""Reads the quant folder: integer codes, scales, the float rest, the tokenizer. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from calibration.checkpoints.foreign import reason
from calibration.checkpoints.safetensors import dtype_name, read_header, read_tensor
from calibration.checkpoints.tokenizer import check_named, load_tokenizer
from calibration.families import Decoder, Family, UnsupportedError, family
from calibration.families.steps import Rope
from calibration.out.description import SamplingDefaults
from calibration.out.files import sha256_file
from calibration.out.json_file import Count, Size, TokenId, checked, read_json
from calibration.out.layout import QUANT_JSON
from calibration.out.records import FileName, Sha256
from calibration.quant.scheme import QuantLinear, QuantScheme, check_abits, check_kv_bits
from calibration.quant.sizes import stored_items
from plugins import op_spec
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

__all__ = ["FORMAT", "QuantModel", "fuse", "read_quant"]

FORMAT = 1
_AGAIN = "The folder is damaged: quantise the model again"


class _Source(TypedDict):
    name: str
    kind: str
    fingerprint: str


class _Config(TypedDict):
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size
    max_position_embeddings: Size
    bos_token_id: TokenId | None
    eos_token_id: TokenId | list[TokenId] | None
    sampling: NotRequired[SamplingDefaults]
    rope_attention_scaling: float | dict[str, float]  # by the name of the frequencies if several
    hf: dict[str, Any]


class _Sizes(TypedDict):
    linear_weights: Count
    linear_float_bytes: Count
    linear_quant_bits: Count
    bits_per_weight: float
    rest_bytes: Count
    model_float_bytes: Count
    model_quant_bytes: Count


class _Settings(TypedDict):
    effort: str
    calib: str
    seed: Count
    switches: dict[str, Any]


class _Block(TypedDict):
    loss_before: float
    loss_after: float
    notes: list[str]


class _HeadCost(TypedDict):
    bits: str
    divergence: float | None
    rise: float | None
    loss_float: float | None
    loss_quantized: float | None
    loss_error: float | None
    tokens: Count
    kept: bool


class _Calibration(TypedDict, total=False):
    settings: _Settings
    windows: tuple[Size, Size]
    blocks: list[_Block]
    head: _HeadCost
    rotation: str
    kept: str


class _Meta(TypedDict):
    """What quant.json holds, its format aside."""

    family: str
    source: _Source
    config: _Config
    scheme: Any
    layers: NotRequired[dict[str, Any]]  # absent where all nodes have one scheme
    head: NotRequired[Any]  # absent where the head is a float table
    floats: NotRequired[list[str]]  # nodes that stay in floating point
    reordered: NotRequired[list[str]]  # nodes whose input channels have an order of their own
    files: dict[FileName, Sha256]
    sizes: _Sizes
    calibration: NotRequired[_Calibration]


class QuantModel:
    """A quantised model on disk; tensors are read when asked for.

    Attributes:
        path: the folder.
        config: sizes and token ids (see calibration/quant/quantize.py), "hf" holds the whole
            Hugging Face config.
        scheme: how it is quantised, but for the nodes in `exceptions`.
        exceptions: {GEMM node: its scheme} of a model in mixed precision; the head is none of them.
        head: the head's scheme; None where it is a float table.
        source: {"name", "kind", "fingerprint"} of the float model.
        files: {file name: SHA-256}.
        sizes: bytes and bits before and after.
        calibration: settings and what became of each block; empty for methods without data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = _read_meta(path / QUANT_JSON)
        self.config: dict[str, Any] = dict(meta["config"])
        self.source: _Source = meta["source"]
        self.files: dict[str, str] = meta["files"]
        self.sizes: dict[str, Any] = {**meta["sizes"]}
        self.calibration: dict[str, Any] = {**meta.get("calibration", {})}
        self.family: Family = family(meta["family"])
        self._check_present()
        shards = [path / name for name in sorted(self.files) if name.endswith(".safetensors")]
        self._entries = {
            name: (shard, entry) for shard in shards for name, entry in read_header(shard).items()
        }
        floats = meta.get("floats", [])
        self.decoder = self._decoder()
        self._known_nodes(dict.fromkeys(floats), "floats")
        self.decoder = self.decoder.with_floats(floats)
        if not self.decoder.nodes:
            raise InputError(
                f"{path / QUANT_JSON}, floats",
                "got every GEMM node, expected some with codes",
                _AGAIN,
            )
        self.scheme = _scheme(f"{path / QUANT_JSON}, scheme", meta["scheme"])
        self.exceptions = {
            node: self._exception(f"layers, {node}", fields)
            for node, fields in self._known_nodes(meta.get("layers", {})).items()
        }
        self.head = self._exception("head", meta["head"]) if "head" in meta else None
        if self.head is not None:
            self.decoder = self.decoder.with_quantized_head()
        reordered = meta.get("reordered", [])
        self._known_nodes(dict.fromkeys(reordered), "reordered")
        self.decoder = self.decoder.reordered(reordered)
        self._check_tensors()

    def _decoder(self) -> Decoder:
        layers, hf = self.config["num_hidden_layers"], self.config["hf"]
        if hf.get("num_hidden_layers") != layers or layers > len(self._entries):
            raise InputError(
                f"{self.path / QUANT_JSON}, config",
                f"got {layers} decoder layers, {hf.get('num_hidden_layers')} in hf, and "
                f"{len(self._entries)} tensors, expected numbers that belong together",
                _AGAIN,
            )
        try:
            decoder = self.family.decoder(self.config["hf"])
            decoder.shapes()  # asks for the sizes that are left
            return decoder
        except (KeyError, TypeError, ValueError, UnsupportedError) as error:
            raise InputError(
                f"{self.path / QUANT_JSON}, config",
                f"got fields that no {self.family.name} decoder has ({reason(error)})",
                _AGAIN,
            ) from None

    def _known_nodes(self, layers: dict[str, Any], field: str = "layers") -> dict[str, Any]:
        nodes = self.decoder.nodes
        for node in layers:
            if node not in nodes:
                raise InputError(
                    f"{self.path / QUANT_JSON}, {field}",
                    f"got {node}, expected GEMM nodes such as {nodes[0]}",
                    _AGAIN,
                )
        return layers

    def _exception(self, place: str, fields: Any) -> QuantScheme:
        where = f"{self.path / QUANT_JSON}, {place}"
        scheme = _scheme(where, fields)
        for key in ("dtype", "kv_bits"):
            got, wanted = getattr(scheme, key), getattr(self.scheme, key)
            if got != wanted:
                raise InputError(where, f"got {key} {got}, expected the model's {wanted}", _AGAIN)
        return scheme

    def _check_present(self) -> None:
        missing = [name for name in self.files if not (self.path / name).is_file()]
        if missing:
            raise InputError(
                str(self.path), f"got no {missing[0]}, expected it from {QUANT_JSON}", _AGAIN
            )

    def _check_tensors(self) -> None:
        scaling, known = self.config["rope_attention_scaling"], self.decoder.frequencies
        if isinstance(scaling, dict) and scaling.keys() != known.keys():
            raise InputError(
                f"{self.path / QUANT_JSON}, config, rope_attention_scaling",
                f"got {', '.join(scaling)}, expected {', '.join(known)}",
                _AGAIN,
            )
        items = stored_items(self.decoder, self.scheme, self.scheme_of)
        wanted = {spec.name: spec for item in items for spec in item.specs}
        if strange := sorted(self._entries.keys() ^ wanted.keys()):
            got, expected = ("no", "it") if strange[0] in wanted else ("a", "no such")
            raise InputError(
                str(self.path),
                f"got {got} tensor {strange[0]}, expected {expected} from the config",
                _AGAIN,
            )
        for name, (shard, entry) in self._entries.items():
            dtype, shape = dtype_name(wanted[name].dtype), wanted[name].shape
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise InputError(
                    f"{shard}, tensor {name}",
                    f"got {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}",
                    _AGAIN,
                )

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: a file has changed since it was written.
        """
        for name, wanted in self.files.items():
            got = sha256_file(self.path / name)
            if got != wanted:
                raise InputError(
                    str(self.path / name),
                    f"got SHA-256 {got[:12]}..., expected {wanted[:12]}... from {QUANT_JSON}",
                    _AGAIN,
                )

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._entries

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, a read-only view of the file (bfloat16 as the ml_dtypes type).

        Raises:
            InputError: there is none of this name.
        """
        if name not in self._entries:
            raise InputError(
                str(self.path), f"got no tensor {name}, expected it from the config", _AGAIN
            )
        return read_tensor(*self._entries[name])

    def rope(self, step: Rope, context: int) -> tuple[np.ndarray, float]:
        """Rotary frequencies fp32 [rotated channels / 2] of a context of so many positions, and the
        factor on cos and sin.
        """
        name, scaling = step.frequencies(step.long(context)), self.config["rope_attention_scaling"]
        found = scaling[name] if isinstance(scaling, dict) else scaling
        return np.array(self.tensor(name), np.float32), float(found)

    def scheme_of(self, name: str) -> QuantScheme:
        """How a linear, or a GEMM node, is quantised; by its full name."""
        node = self.decoder.node(name)
        if self.head is not None and node == self.decoder.head.name:
            return self.head
        return self.exceptions.get(node, self.scheme)

    @property
    def label(self) -> str:
        """Of the scheme; w4a8-mixed where some nodes have another or none."""
        mixed = self.exceptions or self.decoder.floats
        return f"{self.scheme.model_label}-mixed" if mixed else self.scheme.model_label

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        """Every scheme in use, by first use."""
        return tuple(dict.fromkeys(map(self.scheme_of, self.decoder.nodes)))

    def weights(self) -> dict[QuantScheme, int]:
        """{scheme: how many weights it has}, by first use."""
        found = dict.fromkeys(self.schemes, 0)
        for node, site in self.decoder.sites.items():
            found[self.scheme_of(node)] += site.linears.out_features * site.linears.in_features
        return found

    def linear(self, name: str) -> QuantLinear:
        """One quantised linear by its Hugging Face name, such as model.layers.0.self_attn.q_proj."""
        scheme, codes = self.scheme_of(name), self.tensor(f"{name}.codes")
        attrs = scheme.attributes(codes.shape[0], codes.shape[1], self.has(f"{name}.bias"))
        found = {
            array.name: self.tensor(f"{name}.{array.name}")
            for array in op_spec(scheme.op).arrays(attrs)
        }
        return QuantLinear(name, scheme, QuantArrays.of(found))

    def order(self, name: str) -> np.ndarray | None:
        """The channel that comes to each place of the input of a linear, or GEMM node, by its full
        name: int32 [in_features]; None where they are in order.

        Raises:
            InputError: they are not each channel once.
        """
        found = self.decoder.orders.get(self.decoder.node(name))
        if found is None:
            return None
        order = np.array(self.tensor(found[0]))
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise InputError(
                f"{self.path}, tensor {found[0]}",
                f"got other numbers than 0 to {len(order) - 1}, each once",
                _AGAIN,
            )
        return order

    def fused(self, names: Sequence[str], name: str = "") -> QuantLinear:
        """Several linears that read the same tensor, stacked along the output in the order given."""
        return fuse([self.linear(member) for member in names], name or "+".join(names))

    def groups(self, layer: int) -> list[QuantLinear]:
        """The fused linears of a decoder layer in execution order, named as its GEMM nodes."""
        block = self.decoder.blocks[layer]
        return [
            self.fused(self.decoder.members(node), node)
            for node in map(block.name, block.quantized)
        ]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.decoder.layers

    def tokenizer(self) -> Any:
        """The transformers tokenizer (this imports transformers).

        Raises:
            InputError: the folder holds a file that quant.json does not name, or code.
        """
        check_named(self.path, {*self.files, QUANT_JSON}, _AGAIN)
        return load_tokenizer(self.path, _AGAIN)


def fuse(linears: Sequence[QuantLinear], name: str) -> QuantLinear:
    """Stack linears along the output; where only some have a bias, the others get zeros."""
    if len(linears) == 1:
        return QuantLinear(name, linears[0].scheme, linears[0].arrays)
    parts = [linear.arrays for linear in linears]
    if any(part.bias is not None for part in parts):
        parts = [
            replace(part, bias=np.zeros(len(part.codes), np.float32)) if part.bias is None else part
            for part in parts
        ]
    return QuantLinear(name, linears[0].scheme, QuantArrays.stacked(parts))


def _scheme(where: str, fields: Any) -> QuantScheme:
    scheme = checked(fields, QuantScheme, where, _AGAIN)
    known = {field.name for field in dataclass_fields(QuantScheme)}
    if unknown := sorted(fields.keys() - known):
        raise InputError(where, f"got a scheme with {unknown[0]}, expected no such field", _AGAIN)
    check_abits(scheme.abits, where)
    check_kv_bits(scheme.kv_bits, where)
    if objection := op_spec(scheme.op).objection(scheme.gemm):
        raise InputError(where, *objection)
    return scheme


def _read_meta(path: Path) -> _Meta:
    meta = read_json(path, _AGAIN)
    if meta.get("format") != FORMAT:
        raise InputError(
            str(path),
            f"got format {json.dumps(meta.get('format'))}, expected {FORMAT}",
            "Quantise the model again with this version",
        )
    checked(meta, _Meta, str(path), _AGAIN)
    return cast(_Meta, meta)  # with the fields that nobody has to check


def read_quant(path: Path | str, verify: bool = True) -> QuantModel:
    """Open a quant folder.

    Args:
        path: the folder (OUT/quant).
        verify: compare every file with its checksum.

    Raises:
        InputError: missing, corrupt or changed files.
    """
    model = QuantModel(Path(path))
    if verify:
        model.verify()
    return model
