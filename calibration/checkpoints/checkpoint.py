"""Opens a float model (Hugging Face folder, hub id, alias or GGUF) and checks it as a whole before
any work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.huggingface import WeightSource, open_hf_weights, read_source_json
from calibration.checkpoints.side_files import Generation, read_generation
from calibration.checkpoints.sources import Source, fetch_weights, model_slug, resolve_source
from calibration.checkpoints.tensor_checks import check_finite, check_tensors
from calibration.families import (
    Decoder,
    Family,
    UnsupportedError,
    accepted_architectures,
    family_of_architecture,
)
from calibration.out.fingerprint import file_stamps
from plugins.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "open_checkpoint", "plain_config"]

SMALL_FILES = ("*.json", "tokenizer*", "*.jinja", "*.model", "additional_chat_templates/*.jinja")
# The other kinds change their frequencies with the sequence length.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class Checkpoint:
    """A float model whose config, tensor names and shapes are known to be right.

    Attributes:
        source: what the user asked for and where it lies.
        family: its declaration.
        config: transformers config.
        decoder: its steps with the model's sizes.
        generation: how its makers want text to be made.
    """

    def __init__(self, source: Source, family: Family, config: Any, weights: WeightSource) -> None:
        self.source = source
        self.family = family
        self.config = config
        self.decoder: Decoder = family.decoder(plain_config(config))
        self.generation = read_generation(source.path) if source.path.is_dir() else Generation()
        self._weights = weights
        where = source.hub_id or str(source.path)
        check_tensors(where, self.decoder.shapes(), weights.shapes(), self.decoder.layers)

    @property
    def name(self) -> str:
        """Short name, for folders and reports."""
        return model_slug(self.source.name)

    @property
    def parameter_count(self) -> int:
        """Weights of the whole model."""
        return sum(map(math.prod, self.decoder.shapes().values()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of the weight files' sizes and sampled pieces; the same on every
        machine.
        """
        digest = hashlib.sha256(json.dumps(self.hf_config(), sort_keys=True).encode())
        for path in self._weights.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            step = max(size // _SAMPLES, _SAMPLE_BYTES)
            with path.open("rb") as file:
                for offset in [*range(0, size, step), max(size - _SAMPLE_BYTES, 0)]:
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def input_files(self) -> list[Path]:
        """The local files that decide the result: weights, config, tokenizer."""
        small = (
            []
            if self.source.kind == "gguf"
            else [path for pattern in SMALL_FILES for path in self.source.path.glob(pattern)]
        )
        return sorted({*self._weights.files, *small})

    def stamp(self) -> list[Any]:
        """Everything of the model that a result depends on: its files, and what its family says."""
        files = file_stamps(self.input_files())
        return [self.fingerprint, files, self.decoder.declaration()]

    def hf_config(self) -> dict[str, Any]:
        """The transformers config as plain JSON, without anything that depends on this machine."""
        return plain_config(self.config)

    def array(self, name: str) -> np.ndarray:
        """One tensor as the decoder's steps compute with it, in its stored type (GGUF: fp32).

        Raises:
            InputError: it holds NaN or Inf.
        """
        array = self.stored(name)
        offset = self.decoder.offsets.get(name)
        return array if offset is None else array.astype(np.float32) + np.float32(offset)

    def stored(self, name: str) -> np.ndarray:
        """One tensor as the checkpoint has it. Raises as array()."""
        array = self._weights.array(name)
        check_finite(f"{self.source.hub_id or self.source.path}, tensor {name}", array)
        return array

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as fp32 torch."""
        import torch

        return torch.from_numpy(self.array(name).astype(np.float32))

    def rope(self) -> tuple[np.ndarray, float]:
        """Rotary frequencies fp32 [head_dim/2], and the factor on cos and sin."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(self.config)
        frequencies = np.asarray(rotary.inv_freq.numpy(), np.float32)
        factors = getattr(self._weights, "rope_factors", lambda: None)()
        return frequencies if factors is None else frequencies / factors, float(
            rotary.attention_scaling
        )

    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        if self.source.kind == "gguf":
            from calibration.checkpoints.gguf import GgufFile
            from calibration.checkpoints.gguf_tokenizer import gguf_tokenizer

            return gguf_tokenizer(GgufFile(self.source.path))
        from transformers import AutoTokenizer

        path = self.source.path
        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many kinds
            if _needs_sentencepiece(path):
                raise InputError(
                    str(path / "tokenizer.model"),
                    "got a sentencepiece tokenizer and no tokenizer.json, expected the package "
                    "sentencepiece to read it",
                    "Run `pip install sentencepiece`, or put the model's tokenizer.json beside it",
                ) from None
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise InputError(
                str(path),
                f"got no readable tokenizer ({reason})",
                "Put the model's tokenizer.json and tokenizer_config.json beside its weights",
            ) from None


def _needs_sentencepiece(folder: Path) -> bool:
    path = folder / "tokenizer.model"
    return (
        path.is_file()
        and not (folder / "tokenizer.json").exists()
        and importlib.util.find_spec("sentencepiece") is None
    )


def open_checkpoint(model: str, offline: bool = False) -> Checkpoint:
    """Open a model by alias, hub id, folder or .gguf file; weights are not read yet.

    Raises:
        InputError: it is not there, damaged, incomplete, already quantised or of an unknown
            architecture.
    """
    source = resolve_source(model, offline)
    if source.kind == "gguf":
        return _open_gguf(source)
    family, config = _open_config(source.path)
    folder = fetch_weights(source, offline)
    return Checkpoint(
        Source(source.name, source.kind, folder, source.hub_id),
        family,
        config,
        open_hf_weights(folder),
    )


def _open_gguf(source: Source) -> Checkpoint:
    from calibration.checkpoints.gguf import GgufFile, GgufWeights
    from calibration.checkpoints.gguf_config import gguf_config, gguf_family

    file = GgufFile(source.path)
    family = gguf_family(file)
    config = _make_config(str(source.path), gguf_config(file, family), family)
    return Checkpoint(
        source, family, config, GgufWeights(file, family.decoder(plain_config(config)))
    )


def _open_config(folder: Path) -> tuple[Family, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            str(folder),
            "got a folder without config.json, expected a Hugging Face model folder",
            "Give the folder that holds config.json and the weights",
        )
    raw = read_source_json(path)
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    if quantised:
        method = (
            quantised.get("quant_method", "of unknown name")
            if isinstance(quantised, dict)
            else "of unknown name"
        )
        raise InputError(
            str(path),
            f"got an already quantised checkpoint (quant_method {method}), "
            "expected float32, float16 or bfloat16 weights, or a .gguf file",
            "Give the float model it was made from",
        )
    architectures = raw.get("architectures") or []
    if not architectures:
        raise InputError(
            str(path),
            f"got no architectures, expected one of {', '.join(accepted_architectures())}",
            "Add the model's class to config.json",
        )
    family = family_of_architecture(str(architectures[0]), str(path))
    return family, _make_config(str(path), raw, family)


def _make_config(where: str, raw: dict[str, Any], family: Family) -> Any:
    from transformers import AutoConfig

    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(family.model_type, **values)
    except Exception as error:  # transformers' strict configs raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            where, f"got a config that transformers refuses ({reason})", "Correct the named field"
        ) from None
    try:
        objection = _objection(config) or family.objection(config)
        family.decoder(plain_config(config))
    except UnsupportedError as error:
        objection = str(error)
    except (KeyError, TypeError, ValueError) as error:  # a field that only this family reads
        objection = (
            f"got fields that no {family.name} decoder has ({type(error).__name__}: {error})"
        )
    if objection:
        raise InputError(
            where, objection, "Choose a model without it; this export would compute something else"
        )
    return config


def _objection(config: Any) -> str:
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STATIC_ROPE:
        return (
            f"got rope_type {rope_type} (frequencies that change with the length), expected "
            f"one of {', '.join(STATIC_ROPE)}"
        )
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return (
            f"got partial_rotary_factor {rope['partial_rotary_factor']}, expected 1 (the "
            f"whole head rotates)"
        )
    return ""


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers config as plain JSON, without anything that depends on this machine."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {
        key: value
        for key, value in values.items()
        if key not in ("_name_or_path", "transformers_version")
    }
