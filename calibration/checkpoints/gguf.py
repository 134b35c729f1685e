"""Reads a .gguf file as a Hugging Face checkpoint: config from the metadata, tensors dequantised
one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from calibration.families import Decoder, Family, family, family_names
from calibration.families.steps import Linears, TensorInfo
from plugins.errors import InputError

__all__ = ["GgufFile", "GgufWeights", "gguf_config", "gguf_family"]

_ROPE_FACTORS = "rope_freqs.weight"
_LARGEST = 1e12
_LONGEST_LIST = 1000
_AGAIN = "The file is truncated or damaged: download it again"


class _CheckedReader(GGUFReader):  # type: ignore[misc]
    """GGUFReader slices past the end of the file without a word; this one says so."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"got {len(self.data)} bytes, expected at least {end}")
        return super()._get(offset, dtype, count, *args, **kwargs)


class GgufFile:
    """An open GGUF file: metadata and raw tensors.

    Raises:
        InputError: not a GGUF file, truncated, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
            if magic != b"GGUF":
                raise InputError(
                    str(path),
                    f"got first bytes {magic!r}, expected b'GGUF'",
                    "This is not a GGUF file: check the download",
                )
            reader = _CheckedReader(path)
            # The token lists are half a million little arrays: only the rest is kept.
            self._values = {
                key: field.contents()
                for key, field in reader.fields.items()
                if len(field.data) <= _LONGEST_LIST
            }
        except OSError as error:
            raise InputError(
                str(path),
                f"got {error.strerror}, expected a GGUF file",
                "Check the path and the permissions",
            ) from None
        except EOFError as error:
            raise InputError(str(path), str(error), _AGAIN) from None
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            raise InputError(str(path), f"got a damaged GGUF file ({error})", _AGAIN) from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """One metadata value."""
        return self._values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """One metadata number above zero; without a default it must be there."""
        value = self.required(key) if default is None else self.value(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < _LARGEST
        ):
            raise InputError(
                f"{self.path}, metadata {key}",
                f"got {str(value)[:40]!r}, expected a positive number",
                _AGAIN,
            )
        return value

    def required(self, key: str) -> Any:
        """One metadata value that must be there."""
        value = self.value(key)
        if value is None:
            raise InputError(
                str(self.path),
                f"got no metadata {key}, expected it in a model file",
                "Convert the model to GGUF again",
            )
        return value


def gguf_family(file: GgufFile) -> Family:
    """The family that reads this file.

    Raises:
        InputError: none does.
    """
    architecture = str(file.required("general.architecture"))
    accepted = {family(name).gguf: family(name) for name in family_names() if family(name).gguf}
    if architecture not in accepted or file.value(f"{architecture}.expert_count", 0):
        got = f"{architecture} with experts" if architecture in accepted else architecture
        raise InputError(
            str(file.path),
            f"got architecture {got}, expected one of {', '.join(accepted)}",
            "Choose a model of a supported architecture",
        )
    return accepted[architecture]


def gguf_config(file: GgufFile, found: Family) -> dict[str, Any]:
    """The Hugging Face config that the metadata and the tensors describe."""
    key = f"{found.gguf}."
    heads, hidden = (
        int(file.number(key + "attention.head_count")),
        int(file.number(key + "embedding_length")),
    )
    head_dim = int(file.number(key + "attention.key_length", hidden // heads))
    layers = int(file.number(key + "block_count"))
    if layers > len(file.tensors):
        raise InputError(
            f"{file.path}, metadata {key}block_count",
            f"got {layers}, expected at most the {len(file.tensors)} tensors of the file",
            _AGAIN,
        )
    embedding = file.tensors.get("token_embd.weight")
    return {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(file.number(key + "feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.number(key + "attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": int(embedding.shape[-1])
        if embedding is not None
        else int(file.number(key + "vocab_size")),
        "max_position_embeddings": int(file.number(key + "context_length")),
        "rms_norm_eps": file.number(key + "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
        "rope_parameters": _rope(file, key, head_dim),
    }


def _rope(file: GgufFile, key: str, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.number(key + "rope.freq_base", 10000.0),
    }
    scaling = str(file.value(key + "rope.scaling.type", "none"))
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": file.number(key + "rope.scaling.factor", 1.0)}
    rotated = int(file.number(key + "rope.dimension_count", head_dim))
    return rope if rotated == head_dim else rope | {"partial_rotary_factor": rotated / head_dim}


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


class GgufWeights:
    """Tensors of a GGUF file under Hugging Face names; rows that RoPE rotates are put back in
    order.
    """

    def __init__(self, file: GgufFile, decoder: Decoder) -> None:
        self.files = [file.path]
        self._file = file
        self._head_dim = decoder.blocks[0].heads.head_dim
        self._names = {
            info.name: info for info in _known_tensors(decoder) if info.gguf in file.tensors
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that the family knows."""
        tensors = self._file.tensors
        return {
            hf: tuple(reversed([int(n) for n in tensors[info.gguf].shape]))
            for hf, info in self._names.items()
        }

    def array(self, name: str) -> np.ndarray:
        """One tensor, dequantised to fp32."""
        info = self._names[name]
        tensor = self._file.tensors[info.gguf]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self._file.path}, tensor {info.gguf}",
                f"got type {tensor.tensor_type.name} that cannot be read ({error})",
                "Convert the model to another GGUF type, such as Q8_0 or F16",
            ) from None
        if info.offset:  # these files hold what the decoder multiplies with
            values = values - np.float32(info.offset)
        return self._rows_in_order(values) if info.rotary else values

    def rope_factors(self) -> np.ndarray | None:
        """Divisors of the rotary frequencies (LLaMA 3.1 files carry them as a tensor), or None."""
        tensor = self._file.tensors.get(_ROPE_FACTORS)
        return (
            None
            if tensor is None
            else np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(-1)
        )

    def _rows_in_order(self, rows: np.ndarray) -> np.ndarray:
        # GGUF stores each head's rows as pairs (0, d/2), (1, d/2 + 1) ...; Hugging Face as two
        # halves.
        pairs = rows.reshape(-1, self._head_dim // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
