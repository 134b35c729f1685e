"""Opens a model (Hugging Face folder, hub id, alias or GGUF), quantized already or not, and checks it
as a whole before any work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from calibration.checkpoints.foreign import (
    DOWNLOAD_AGAIN,
    quiet_transformers,
    reason,
    without_negatives,
)
from calibration.checkpoints.huggingface import Place, WeightSource, open_hf_weights
from calibration.checkpoints.quantized import IN_CONFIG, open_stored, stored_config
from calibration.checkpoints.side_files import Generation, read_generation
from calibration.checkpoints.sources import Source, fetch_weights, model_slug, resolve_source
from calibration.checkpoints.tensor_checks import check_finite, match_tensors, same_numbers
from calibration.checkpoints.tokenizer import load_tokenizer, refuse_code
from calibration.families import (
    Decoder,
    Family,
    UnsupportedError,
    accepted_architectures,
    family_of_architecture,
)
from calibration.families.steps import Rope
from calibration.out.files import sha256_file
from calibration.out.json_file import TokenId, checked, read_json
from plugins.errors import InputError
from plugins.text import shown

if TYPE_CHECKING:
    import torch

    from calibration.checkpoints.codes import StoredLinear

__all__ = ["Checkpoint", "open_checkpoint", "plain_config"]

SMALL_FILES = ("*.json", "tokenizer*", "*.jinja", "*.model", "additional_chat_templates/*.jinja")
_LONGEST = 400  # characters of an objection
ADAPTER = "adapter_config.json"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
# Of stored rotary frequencies: bfloat16's rounding, and fp16's near zero.
_NEAR, _NEAR_ZERO = 2.0**-8, 2.0**-24
# Fields of a config that let transformers take weights or another config from elsewhere, or change
# single layers.
_ELSEWHERE = (
    "configuration_files",
    "fusion_config",
    "per_layer_config",
    "text_config",
    "transformers_weights",
)

# Of a config with fields of which a family makes no decoder.
_NO_DECODER = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

# No model is near these sizes. What a file really holds is compared with its header afterwards,
# but a config becomes a decoder, and lists of transformers', before its weights are there.
_Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
_Experts = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
_Labels = Annotated[int, msgspec.Meta(ge=0, le=1 << 12)]
# fp32, in which RoPE's angles are computed, knows no odd positions beyond.
_Positions = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


@dataclass(frozen=True)
class _Fields:
    """What a config.json says of sizes and kinds."""

    architectures: list[str] | None = None
    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Width | None = None
    num_key_value_heads: _Width | None = None
    head_dim: _Width | None = None
    vocab_size: _Width | None = None
    max_position_embeddings: _Positions | None = None
    sliding_window: _Positions | None = None
    num_local_experts: _Experts | None = None
    num_experts: _Experts | None = None
    num_labels: _Labels | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool | None = None
    is_causal: bool | None = None


class Checkpoint:
    """A model whose config, tensor names and shapes are known to be right. Of one that is quantized
    already, array() gives the floats that its codes stand for, and coded() these.

    Attributes:
        source: what the user asked for and where it lies.
        family: its declaration.
        config: transformers config.
        decoder: its steps with the model's sizes.
        generation: how its makers want text to be made.
        warnings: what is odd about its files and changes no result, a line each.
    """

    def __init__(self, source: Source, family: Family, config: Any, weights: WeightSource) -> None:
        self.source = source
        self.family = family
        self.config = config
        self.decoder: Decoder = family.decoder(plain_config(config))
        self.generation = read_generation(source.path) if source.path.is_dir() else Generation()
        self._weights = weights
        spare = getattr(weights, "spare", ())
        self._names = match_tensors(self._where, self.decoder, weights.shapes(), spare)
        if self._has_own_head():
            config.tie_word_embeddings = False
            self.decoder = family.decoder(plain_config(config))
        for name in self.decoder.frequencies:
            self.rope(name)  # settings without frequencies are refused before any work
        self.warnings = [*getattr(weights, "warnings", ()), *self._odd_frequencies()]

    @property
    def _where(self) -> str:
        return self.source.hub_id or str(self.source.path)

    def _has_own_head(self) -> bool:
        """Whether a model that its config calls tied has another head in its file: transformers
        then ties nothing.
        """
        table, head = f"{self.decoder.embedding.name}.weight", f"{self.decoder.head.name}.weight"
        stored = self._names.stored
        return (
            self.decoder.tied
            and head in stored
            and not same_numbers(*(self._weights.array(stored[name]) for name in (table, head)))
        )

    def _odd_frequencies(self) -> list[str]:
        """Stored rotary frequencies, which nobody reads, not transformers either, and which are not
        those of the config: the model may have been trained with another.
        """
        names = [name for name in self._names.inert.values() if name.endswith("inv_freq")]
        if not names:
            return []
        scaled = self.rope()[0]
        step, _ = next(iter(self.decoder.frequencies.values()))
        theta = float(_rope_parameters(self.config, step)["rope_theta"])
        exponents = np.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
        plain = theta**-exponents  # models of old saved these, and scaled positions instead
        shapes = self._weights.shapes()
        for name in names:
            near = shapes[name] == scaled.shape and any(
                np.allclose(self._weights.array(name), wanted, rtol=_NEAR, atol=_NEAR_ZERO)
                for wanted in (scaled, plain)
            )
            if not near:
                return [
                    f"{shown(name)} holds other rotary frequencies than those of rope_theta "
                    f"{theta:g}, which is used, as transformers does. If the model was trained with "
                    "the others, correct rope_theta in config.json."
                ]
        return []

    @property
    def renaming(self) -> Mapping[str, str]:
        """{pattern of the files' names: what stands for it in the model's}; empty where they are
        the same.
        """
        return self._names.renaming

    @property
    def format(self) -> str:
        """In which its codes are stored, as calibration/formats calls it; "" of a float model."""
        return str(getattr(self._weights, "format", ""))

    def coded(self, name: str) -> StoredLinear | None:
        """A linear's codes, by its name without ".weight"; None of one that is stored as floats."""
        find = getattr(self._weights, "coded", None)
        info = self.decoder.infos[f"{name}.weight"]
        found = find and find(self._names.stored[info.stored])
        return found and (found.rows(info.rows) if info.whole else found)

    def plain(self, name: str) -> bool:
        """Whether a linear is stored in floating point, by its name without ".weight"."""
        find = getattr(self._weights, "plain", None)
        info = self.decoder.infos[f"{name}.weight"]
        return find is None or bool(find(self._names.stored[info.stored]))

    @property
    def inert(self) -> Collection[str]:
        """Names of buffers in the files that nobody reads."""
        return self._names.inert.keys()

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
        """Hash of the config and of the weight files' sizes and sampled pieces, in order; the same
        on every machine and whatever they are called.
        """
        settings = getattr(self._weights, "settings", {})
        told = self.hf_config() | ({"quantization_config": settings} if settings else {})
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for path in self._weights.files:
            size = path.stat().st_size
            digest.update(f" {size}".encode())
            step = max(size // _SAMPLES, _SAMPLE_BYTES)
            with path.open("rb") as file:
                for offset in [*range(0, size, step), max(size - _SAMPLE_BYTES, 0)]:
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def stamp(self) -> list[Any]:
        """Everything of the model that a result depends on: what is in its files, wherever they lie,
        and what its family says.
        """
        folder = self.source.path
        found = {path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
        small = {str(path.relative_to(folder)): sha256_file(path) for path in found}
        return [self.fingerprint, small, self.decoder.declaration()]

    def hf_config(self) -> dict[str, Any]:
        """The transformers config as plain JSON, without anything that depends on this machine."""
        return plain_config(self.config)

    def array(self, name: str) -> np.ndarray:
        """One tensor as the decoder's steps compute with it, in its stored type (GGUF: fp32).

        Raises:
            InputError: it holds NaN or Inf.
        """
        array, info = self.stored(name), self.decoder.infos.get(name)
        if info is None or (info.factor, info.offset) == (1, 0):
            return array
        return array.astype(np.float32) * np.float32(info.factor) + np.float32(info.offset)

    def stored(self, name: str) -> np.ndarray:
        """One tensor as the checkpoint has it. Raises as array()."""
        info = self.decoder.infos.get(name)
        rows: Place | None = info.rows if info and info.whole else None
        if info and info.stored in self._names.packed:
            rows = info.place
        array = self._weights.array(self._names.stored[info.stored if info else name], rows)
        check_finite(f"{self._where}, tensor {name}", array)
        return array

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as fp32 torch."""
        import torch

        return torch.from_numpy(self.array(name).astype(np.float32))

    def rope(self, name: str = "") -> tuple[np.ndarray, float]:
        """Rotary frequencies fp32 [rotated channels / 2], and the factor on cos and sin.

        Args:
            name: of decoder.frequencies; "" is the first.

        Raises:
            InputError: the config's numbers make none.
        """
        known = self.decoder.frequencies
        step, long = known[name] if name else next(iter(known.values()))
        width = self.decoder.rotated(step)
        try:
            frequencies, scaling = _rotary(self.config, step, long, width)
        except Exception as error:  # transformers computes with whatever the config holds
            raise self._no_rope(reason(error)) from None
        if not (np.isfinite(frequencies).all() and 0 < scaling < math.inf):
            raise self._no_rope("they are not finite")
        if frequencies.shape != (width // 2,):
            raise self._no_rope(f"they are {len(frequencies)} for {width // 2} pairs of a head")
        factors = getattr(self._weights, "rope_factors", lambda: None)()
        return frequencies if factors is None else frequencies / factors, scaling

    def _no_rope(self, why: str) -> InputError:
        return InputError(
            self._where,
            f"got RoPE settings without frequencies ({why})",
            "Correct rope_theta and rope_scaling in config.json",
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
        return load_tokenizer(
            self.source.path,
            "Put the model's tokenizer.json and tokenizer_config.json beside its weights",
        )


def open_checkpoint(model: str, offline: bool = False) -> Checkpoint:
    """Open a model by alias, hub id, folder or .gguf file; weights are not read yet.

    Raises:
        InputError: it is not there, damaged, incomplete, quantized in a format that is not read, or
            of an unknown architecture.
    """
    source = resolve_source(model, offline)
    if source.kind == "gguf":
        return _open_gguf(source)
    family, config, stored = _open_config(source.path)
    folder = fetch_weights(source, offline)
    return Checkpoint(
        Source(source.name, source.kind, folder, source.hub_id),
        family,
        config,
        open_stored(folder, open_hf_weights(folder), stored),
    )


def _open_gguf(source: Source) -> Checkpoint:
    from calibration.checkpoints.gguf import GgufFile, GgufWeights
    from calibration.checkpoints.gguf_config import gguf_config, gguf_family

    file = GgufFile(source.path)
    family = gguf_family(file)
    values = gguf_config(file, family)
    checked(values, _Fields, str(source.path), "Choose a model that is not so large")
    with suppress(
        *_NO_DECODER
    ):  # else transformers fills in what the file leaves to the architecture
        GgufWeights(
            file, family.decoder(values)
        )  # refuses before transformers is read, for seconds
    config = _make_config(str(source.path), values, family)
    return Checkpoint(
        source, family, config, GgufWeights(file, family.decoder(plain_config(config)))
    )


def _open_config(folder: Path) -> tuple[Family, Any, dict[str, Any] | None]:
    """Family, transformers config, and what it says of its quantization."""
    path = folder / "config.json"
    if (adapter := folder / ADAPTER).exists():
        raise InputError(
            str(adapter),
            "got a PEFT adapter, expected a whole model",
            "Merge it into its base model with peft's merge_and_unload and give what that saves; "
            f"if the weights beside it have it in them, take {ADAPTER} away",
        )
    if not path.exists():
        raise InputError(
            str(folder),
            "got a folder without config.json, expected a Hugging Face model folder",
            "Give the folder that holds config.json and the weights",
        )
    refuse_code(folder)
    raw = read_json(path, DOWNLOAD_AGAIN)
    ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id") if name in raw}
    raw |= {name: without_negatives(value) for name, value in ids.items()}
    stored = stored_config(folder, raw)
    for key in IN_CONFIG:  # transformers would look for the codes' kernels
        raw.pop(key, None)
    fields = checked(raw, _Fields, str(path), "Correct config.json")
    if not fields.architectures:
        raise InputError(
            str(path),
            f"got no architectures, expected one of {', '.join(accepted_architectures())}",
            "Add the model's class to config.json",
        )
    family = family_of_architecture(shown(fields.architectures[0]), str(path))
    if fields.model_type not in (None, family.model_type):
        raise InputError(
            f"{path}, model_type",
            f"got {shown(fields.model_type)}, expected {family.model_type} with "
            f"{family.architecture}",
            "Correct the one that is not the model's",
        )
    elsewhere = [name for name in _ELSEWHERE if raw.get(name)]
    if elsewhere:
        raise InputError(
            f"{path}, {elsewhere[0]}",
            "got a field that makes transformers read or compute something else, expected none",
            "Choose a model without it; this export would compute something else",
        )
    return family, _make_config(str(path), raw, family), stored


def _make_config(where: str, raw: dict[str, Any], family: Family) -> Any:
    from transformers import AutoConfig

    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(family.model_type, **values)
    except Exception as error:  # transformers' strict configs raise their own kinds
        raise InputError(
            where,
            f"got a config that transformers refuses ({reason(error)})",
            "Correct the named field",
        ) from None
    try:
        objection = _objection(config) or family.objection(config)
        family.decoder(plain_config(config))
    except UnsupportedError as error:
        objection = str(error)
    except _NO_DECODER as error:  # a field that only this family reads
        objection = (
            f"got fields that no {family.name} decoder has "
            f"({type(error).__name__}: {reason(error)})"
        )
    if objection:
        raise InputError(
            where,
            shown(objection, _LONGEST),
            "Choose a model without it; this export would compute something else",
        )
    return config


def _objection(config: Any) -> str:
    if not getattr(config, "is_causal", True):
        return "got is_causal false, expected causal attention"
    padding, vocab = getattr(config, "pad_token_id", None), config.vocab_size
    if padding is not None and not -vocab <= padding < vocab:  # transformers makes no such table
        return f"got pad_token_id {padding}, expected a row of the {vocab} of the embedding"
    return ""


def _rope_parameters(config: Any, step: Rope) -> Any:
    return config.rope_parameters[step.table] if step.table else config.rope_parameters


def _rotary(config: Any, step: Rope, long: bool, width: int) -> tuple[np.ndarray, float]:
    """Frequencies, and the factor on cos and sin, as transformers computes them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _rope_parameters(config, step)
    kind = parameters.get("rope_type", "default")
    if kind == "default":  # in every family's own modelling file, in these words
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        found = 1.0 / (parameters["rope_theta"] ** exponents)
        return np.asarray(found.numpy(), np.float32), 1.0
    length = step.short + 1 if long and step.short is not None else None
    found, scaling = ROPE_INIT_FUNCTIONS[kind](
        config, seq_len=length, layer_type=step.table or None
    )
    return np.asarray(found.numpy(), np.float32), float(scaling)


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers config as plain JSON, without anything that depends on this machine."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {
        key: value
        for key, value in values.items()
        if key not in ("_name_or_path", "transformers_version")
    }
