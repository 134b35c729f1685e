"""Reads the quant folder: integer codes, scales, the float rest, the tokenizer. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.checkpoints.safetensors import read_header, read_tensor
from calibration.checkpoints.tokenizer import check_named, load_tokenizer
from calibration.families import Decoder, Family, UnsupportedError, family
from calibration.out.files import sha256_file
from calibration.out.json_file import read_json
from calibration.out.layout import QUANT_JSON
from calibration.quant.scheme import QuantLinear, QuantScheme
from plugins import op_spec
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

__all__ = ["FORMAT", "QuantModel", "fuse", "read_quant"]

FORMAT = 1
_KEYS = {
    "family": str,
    "source": dict,
    "config": dict,
    "scheme": dict,
    "layers": dict,
    "files": dict,
    "sizes": dict,
}
_AGAIN = "The folder is damaged: quantise the model again"


class QuantModel:
    """A quantised model on disk; tensors are read when asked for.

    Attributes:
        path: the folder.
        config: sizes and token ids (see calibration/quant/quantize.py), "hf" holds the whole
            Hugging Face config.
        scheme: how it is quantised, but for the nodes in `exceptions`.
        exceptions: {GEMM node: its scheme} of a model in mixed precision.
        source: {"name", "kind", "fingerprint"} of the float model.
        files: {file name: SHA-256}.
        sizes: bytes and bits before and after.
        calibration: settings and what became of each block; empty for methods without data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = _read_meta(path / QUANT_JSON)
        self.config: dict[str, Any] = meta["config"]
        self.source: dict[str, str] = meta["source"]
        self.files: dict[str, str] = meta["files"]
        self.sizes: dict[str, Any] = meta["sizes"]
        self.calibration: dict[str, Any] = meta.get("calibration", {})
        self.family: Family = family(meta["family"])
        self.decoder = self._decoder()
        self.scheme = _scheme(str(path / QUANT_JSON), meta["scheme"])
        self.exceptions = {
            node: self._exception(node, fields) for node, fields in meta["layers"].items()
        }
        self._check_present()
        shards = [path / name for name in sorted(self.files) if name.endswith(".safetensors")]
        self._entries = {
            name: (shard, entry) for shard in shards for name, entry in read_header(shard).items()
        }

    def _decoder(self) -> Decoder:
        try:
            return self.family.decoder(self.config["hf"])
        except (KeyError, TypeError, ValueError, UnsupportedError) as error:
            raise InputError(
                f"{self.path / QUANT_JSON}, config",
                f"got fields that no {self.family.name} decoder has ({error})",
                _AGAIN,
            ) from None

    def _exception(self, node: str, fields: Any) -> QuantScheme:
        where, nodes = f"{self.path / QUANT_JSON}, layers", self.decoder.nodes
        if node not in nodes:
            raise InputError(where, f"got {node}, expected GEMM nodes such as {nodes[0]}", _AGAIN)
        scheme = _scheme(f"{where}, {node}", fields)
        for key in ("dtype", "kv_bits"):
            got, wanted = getattr(scheme, key), getattr(self.scheme, key)
            if got != wanted:
                raise InputError(
                    f"{where}, {node}", f"got {key} {got}, expected the model's {wanted}", _AGAIN
                )
        return scheme

    def _check_present(self) -> None:
        missing = [name for name in self.files if not (self.path / name).is_file()]
        if missing:
            raise InputError(
                str(self.path), f"got no {missing[0]}, expected it from {QUANT_JSON}", _AGAIN
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

    def scheme_of(self, name: str) -> QuantScheme:
        """How a linear, or a GEMM node, is quantised; by its full name."""
        return self.exceptions.get(self.decoder.node(name), self.scheme)

    @property
    def label(self) -> str:
        """Of the scheme; w4a8-mixed where some nodes have another."""
        return f"{self.scheme.model_label}-mixed" if self.exceptions else self.scheme.model_label

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

    def fused(self, names: Sequence[str], name: str = "") -> QuantLinear:
        """Several linears that read the same tensor, stacked along the output in the order given."""
        return fuse([self.linear(member) for member in names], name or "+".join(names))

    def groups(self, layer: int) -> list[QuantLinear]:
        """The fused linears of a decoder layer in execution order, named as its GEMM nodes."""
        block = self.decoder.blocks[layer]
        return [
            self.fused(self.decoder.members(node), node) for node in map(block.name, block.sites)
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
        return load_tokenizer(self.path)


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
    try:
        return QuantScheme(**fields)
    except TypeError:
        raise InputError(where, "got a scheme with unknown or missing fields", _AGAIN) from None


def _read_meta(path: Path) -> dict[str, Any]:
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise InputError(
            str(path),
            f"got format {json.dumps(meta.get('format'))}, expected {FORMAT}",
            "Quantise the model again with this version",
        )
    meta = {"layers": {}, **meta}  # absent where all nodes have one scheme
    wrong = [key for key, kind in _KEYS.items() if not isinstance(meta.get(key), kind)]
    if wrong:
        raise InputError(
            str(path), f"got no valid {wrong[0]}, expected a whole {QUANT_JSON}", _AGAIN
        )
    return meta


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
