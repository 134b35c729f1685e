"""Reads .gguf files as a Hugging Face checkpoint: metadata, and tensors dequantized one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from calibration.checkpoints.codes import GGUF, Form, StoredLinear
from calibration.checkpoints.foreign import DOWNLOAD_AGAIN
from calibration.checkpoints.gguf_codes import Codes, CodesForm, form_of, read_codes
from calibration.checkpoints.gguf_header import ANOTHER_TYPE, GgufPart, GgufTensor
from calibration.checkpoints.huggingface import Place
from calibration.families import Decoder
from calibration.families.steps import Linears, TensorInfo
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import some

__all__ = ["GgufFile", "GgufWeights"]

# Part 2 of 3, as gguf-split names it: model-00002-of-00003.gguf; split.no counts from 0.
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_LARGEST = 1e12
_FLOATS = {GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "F64")}


class GgufFile:
    """An open GGUF model: the metadata and the tensors of a file, or of all parts of a split one.

    Attributes:
        path: what was opened, which may be any part.
        paths: every part, in order.
        tensors: by name.

    Raises:
        InputError: a part is missing, is not a GGUF file, is truncated or damaged, or belongs to
            another set.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _whole_set(GgufPart(path))
        self.paths = [part.path for part in parts]
        self.tensors: dict[str, GgufTensor] = {}
        for part in parts:
            twice = self.tensors.keys() & part.tensors.keys()
            if twice:
                raise InputError(
                    f"{part.path}, tensor {min(twice)}",
                    "got this tensor twice, expected it in one part",
                    DOWNLOAD_AGAIN,
                )
            self.tensors |= part.tensors
        self._head = parts[0]  # gguf-split writes the model's metadata there and nowhere else
        total = self.value("split.tensors.count", len(self.tensors))
        if len(parts) > 1 and total != len(self.tensors):
            raise InputError(
                str(path),
                f"got {len(self.tensors)} tensors in {len(parts)} parts, expected {total}",
                DOWNLOAD_AGAIN,
            )

    @property
    def keys(self) -> list[str]:
        """Every key of the metadata."""
        return self._head.keys

    def value(self, key: str, default: Any = None) -> Any:
        """One metadata value, or the default if there is none. Raises as GgufPart.value."""
        return self._head.value(key, default)

    def strings(self, key: str) -> list[str] | None:
        """A list of strings of the metadata, or None if there is none."""
        return self._head.strings(key)

    def numbers(self, key: str) -> list[Any] | None:
        """A list of numbers of the metadata, or None if there is none."""
        return self._head.numbers(key)

    def length(self, key: str) -> int | None:
        """How long a list of the metadata is, or None if there is none."""
        return self._head.length(key)

    def factors(self, name: str, pairs: int | None = None) -> np.ndarray | None:
        """Divisors of the rotary frequencies, fp32 [pairs of a head], or None if there are none.

        Raises:
            InputError: they have another shape, or are not positive numbers.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        where = f"{self.path}, tensor {name}"
        if len(tensor.shape) != 1 or pairs not in (None, *tensor.shape):
            wanted = (
                "a number for each pair of a head" if pairs is None else f"[{pairs}], half a head"
            )
            problem = f"got shape {list(tensor.shape)}, expected {wanted}"
            raise InputError(where, problem, DOWNLOAD_AGAIN)
        factors = dequantized(self, name, tensor)
        wrong = factors[~((factors > 0) & np.isfinite(factors))]
        if wrong.size:
            raise InputError(where, f"got {wrong[0]}, expected positive numbers", DOWNLOAD_AGAIN)
        return factors

    def long_factors(self) -> tuple[list[float], list[float]] | None:
        """longrope's divisors for short texts and for long ones, if both are there."""
        found = [self.factors(name) for name in _LONG_FACTORS]
        if found[0] is None or found[1] is None:
            return None
        return found[0].tolist(), found[1].tolist()

    def says(self, key: str) -> bool:
        """Whether a key's value is more than 0, false or empty, as which llama.cpp's converter
        writes what a model does not have.
        """
        length = self.length(key)
        return bool(self.value(key) if length is None else length)

    def number(self, key: str, default: float | None = None) -> float:
        """One metadata number above zero; without a default it must be there."""
        value = self.required(key) if default is None else self.value(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < _LARGEST
        ):
            raise self.wrong(key, "a positive number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """One metadata number that counts something; without a default it must be there."""
        value = self.number(key, default)
        if value != int(value) or value >= 1 << 31:
            raise self.wrong(key, "a positive whole number below 2^31")
        return int(value)

    def required(self, key: str) -> Any:
        """One metadata value that must be there."""
        if key not in self.keys:
            raise self.missing(key)
        return self.value(key)

    def missing(self, key: str) -> InputError:
        """The error of metadata that must be there."""
        return InputError(
            str(self.path),
            f"got no metadata {key}, expected it in a model file",
            "Convert the model to GGUF again",
        )

    def wrong(self, key: str, expected: str, fix: str = DOWNLOAD_AGAIN) -> InputError:
        """The error of a metadata value that is not what was expected."""
        length = self.length(key)
        got = repr(str(self.value(key))[:40]) if length is None else f"a list of {length}"
        return InputError(
            f"{self.path}, metadata {key[:60]}", f"got {got}, expected {expected}", fix
        )


def _whole_set(part: GgufPart) -> list[GgufPart]:
    """All parts of the model that a file belongs to, in order."""
    count = part.value("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return [part]
    name = _PART_NAME.fullmatch(part.path.name)
    if name is None or int(name["count"]) != count:
        raise InputError(
            str(part.path),
            f"got one of {count} parts under a name of its own, expected NAME-00001-of-{count:05d}.gguf",
            "Give the parts the names that gguf-split gave them",
        )
    paths = [
        part.path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise InputError(
            str(part.path),
            f"got {count - len(missing)} of {count} parts, missing {some(missing)}",
            "Put all parts of the model into one folder",
        )
    parts = [GgufPart(path) for path in paths]
    for index, one in enumerate(parts):
        got = one.value("split.no"), one.value("split.count")
        if got != (index, count):
            raise InputError(
                str(one.path),
                f"got split.no {got[0]} of split.count {got[1]}, expected {index} of {count}",
                "The part belongs to another model or was renamed: download it again",
            )
    return parts


def _known_tensors(decoder: Decoder) -> Iterator[TensorInfo]:
    """Every tensor that a model of this family may have: a bias or head that its config does not
    speak of shows, too.
    """
    blocks = tuple(
        replace(
            block,
            steps=tuple(
                replace(step, members=tuple(replace(one, bias=True) for one in step.members))
                if isinstance(step, Linears)
                else step
                for step in block.steps
            ),
        )
        for block in decoder.blocks
    )
    return replace(decoder, blocks=blocks).untied().tensors()


def dequantized(file: GgufFile, name: str, tensor: GgufTensor) -> np.ndarray:
    """A tensor, or some of its rows, in fp32.

    Raises:
        InputError: its type cannot be read.
    """
    try:
        return np.asarray(dequantize(tensor.data, tensor.type), np.float32)
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"{file.path}, tensor {name}",
            f"got type {tensor.type.name} that cannot be read ({error})",
            ANOTHER_TYPE,
        ) from None


@dataclass(frozen=True)
class _Found:
    """Where a model's tensor is: in a tensor of the file, or as one expert's among those stacked
    there.
    """

    info: TensorInfo
    name: str
    tensor: GgufTensor


class GgufWeights:
    """Tensors of a GGUF model under Hugging Face names; rows that RoPE rotates are put back in
    order, and stacked experts are taken apart.

    Raises:
        InputError: there are tensors that the family does not use, or of a type that cannot be
            read, experts that are not as many as the config's, or rotary factors that are none.
    """

    def __init__(self, file: GgufFile, decoder: Decoder) -> None:
        self.files = file.paths
        self._file = file
        self._head_dim = decoder.blocks[0].heads.head_dim
        found = (self._find(info, decoder) for info in _known_tensors(decoder))
        self._found = {one.info.stored: one for one in found if one is not None}
        self._check_all_used(decoder)
        self._check_types()
        self.rope_factors()

    def _find(self, info: TensorInfo, decoder: Decoder) -> _Found | None:
        """Where a tensor is; None where the file does not have it."""
        name, expert = info.gguf, info.expert
        stacked = expert is not None and name in self._file.tensors
        if expert is not None and not stacked:  # as llama.cpp had them first: ffn_gate.3.weight
            name = name.replace("_exps", f".{expert}")
        tensor = self._file.tensors.get(name)
        if tensor is None or not stacked:
            return None if tensor is None else _Found(info, name, tensor)
        count = decoder.config.experts
        if len(tensor.shape) != 3 or tensor.shape[0] != count:
            raise InputError(
                f"{self._file.path}, tensor {info.gguf}",
                f"got shape {list(tensor.shape)}, expected {[count, *info.shape]}, a matrix for each "
                f"of {count} experts",
                "The weights and the metadata belong to different models: download it again",
            )
        one = replace(tensor, shape=tensor.shape[1:], data=tensor.data[expert])
        return _Found(info, info.gguf, one)

    def _check_all_used(self, decoder: Decoder) -> None:
        used = {one.name for one in self._found.values()} | {_ROPE_FACTORS}
        if any(rope.short is not None for rope in decoder.ropes):
            used |= {*_LONG_FACTORS}
        unknown = [name for name in self._file.tensors if name not in used]
        if unknown:
            raise InputError(
                str(self._file.path),
                f"got tensors that the model's {decoder.layers} layers do not use: {some(unknown)}",
                "The export would drop them: choose a model without them",
            )

    def _check_types(self) -> None:
        """Try one block of each type, so that a type that cannot be read shows before any work."""
        kinds = {tensor.type: (name, tensor) for name, tensor in self._file.tensors.items()}
        for name, tensor in kinds.values():
            block = tensor.data.reshape(-1, tensor.data.shape[-1])[:1]
            dequantized(self._file, name, replace(tensor, data=block))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {hf: one.tensor.shape for hf, one in self._found.items()}

    def array(self, name: str, rows: Place | None = None) -> np.ndarray:
        """One tensor, or some rows of it alone, dequantized to fp32."""
        found = self._found[name]
        info, tensor = found.info, found.tensor
        if rows is not None and not info.rotary and tensor.data.ndim > 1:
            tensor, rows = replace(tensor, data=tensor.data[rows]), None
        values = dequantized(self._file, found.name, tensor)
        if info.offset:  # these files hold what the decoder multiplies with
            values = values - np.float32(info.offset)
        values = self._rows_in_order(values) if info.rotary else values
        return values if rows is None else values[rows]

    @property
    def format(self) -> str:
        """The name of the format where some weights are codes; "" where all are floats."""
        kinds = {one.tensor.type for one in self._found.values()}
        return "" if kinds <= _FLOATS else GGUF

    def coded(self, name: str) -> StoredLinear | None:
        """The codes of a weight; None of one that is stored as floats. Raises as codes_form."""
        tensor = self._found[name].tensor
        if tensor.type in _FLOATS:
            return None
        found, (rows, columns) = self.codes_form(name), tensor.shape
        group = 0 if found.group == columns else found.group
        symmetric = found.zero == 1 << found.bits - 1
        form = Form(code_set(found.bits, False), group, symmetric, found.zero is None)
        return StoredLinear(self._where(name), (rows, columns), form, lambda: self._arrays(name))

    def _where(self, name: str) -> str:
        return f"{self._file.path}, tensor {self._found[name].name}"

    def plain(self, name: str) -> bool:
        """Whether a weight is stored in floating point."""
        return self._found[name].tensor.type in _FLOATS

    def _arrays(self, name: str) -> QuantArrays:
        found = self.codes(name)
        if found.zero is None:
            return QuantArrays(found.codes, found.scale, minimum=found.minimum)
        zero = np.full(found.scale.shape, found.zero, np.int32)
        return QuantArrays(found.codes, found.scale, zero)

    def codes_form(self, name: str) -> CodesForm:
        """How the codes of a tensor are said; see gguf_codes.form_of."""
        return form_of(self._where(name), self._found[name].tensor)

    def codes(self, name: str, rows: slice | None = None) -> Codes:
        """The codes of a tensor, or of some of its rows, in the order of array(); see
        gguf_codes.read_codes.
        """
        found = self._found[name]
        data = found.tensor.data
        if found.info.rotary:
            data = data[self._rows_in_order(np.arange(len(data)))]
        tensor = replace(found.tensor, data=data if rows is None else data[rows])
        return read_codes(self._where(name), tensor)

    def rope_factors(self) -> np.ndarray | None:
        """Divisors of the rotary frequencies, as LLaMA 3.1 files carry them; see GgufFile.factors."""
        return self._file.factors(_ROPE_FACTORS, self._head_dim // 2)

    def _rows_in_order(self, rows: np.ndarray) -> np.ndarray:
        # GGUF stores each head's rows as pairs (0, d/2), (1, d/2 + 1) ...; Hugging Face as two
        # halves.
        pairs = rows.reshape(-1, self._head_dim // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
