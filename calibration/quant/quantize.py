"""Turns a float model into the quant folder, one tensor at a time: bounded memory, the same bytes
every time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration import formats
from calibration.checkpoints.foreign import reason
from calibration.checkpoints.safetensors import SafetensorsWriter, dtype_name, numpy_dtype
from calibration.out.files import folder_bytes, sha256_file, write_json
from calibration.out.fingerprint import digest
from calibration.out.layout import BITS_FILE, QUANT, QUANT_JSON, WORK
from calibration.progress import NullProgress
from calibration.quant.bits import SchemeMap, as_map
from calibration.quant.checks import check_scheme
from calibration.quant.describe import token_list
from calibration.quant.folder import FORMAT, read_quant
from calibration.quant.options import QuantizeOptions
from calibration.quant.scheme import QuantScheme
from calibration.quant.sizes import StoredItem, stored_items
from calibration.quant.source import QuantSource, open_source
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families import Decoder
    from calibration.progress import Progress

__all__ = ["QuantizeOptions", "kept_bytes", "quant_bytes", "quantize_model"]

# Of tokenizer_config.json: what depends on this machine, and code, which was found to be
# transformers' own when the tokenizer was read.
_LEFT_OUT = ("is_local", "local_files_only", "name_or_path", "auto_map")


def quantize_model(
    checkpoint: Checkpoint,
    schemes: QuantScheme | SchemeMap,
    options: QuantizeOptions,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantise a checkpoint into an existing empty folder (OUT/quant, through a StageWriter). Of an
    interrupted run, blocks and weight files that are whole and made of the same are taken.

    Of several processes (torchrun) all calibrate, and the first one writes.

    Returns:
        Facts for the manifest: "summary", the sizes, and what the calibration cost; {} in the
        processes that do not write.

    Raises:
        InputError: settings that do not fit this model, NaN in its weights, no calibration text.
    """
    progress = progress or NullProgress()
    schemes = as_map(schemes)
    check_scheme(checkpoint, schemes, options.format)
    tokenizer = checkpoint.tokenizer()
    # Before the work, since what a file names may be no name for another.
    files = _save_tokenizer(tokenizer, folder) if options.ranks.first else {}
    source = open_source(
        checkpoint,
        schemes,
        replace(options, work=options.work or folder.parent / WORK),
        tokenizer,
        progress,
    )
    for warning in _warnings(checkpoint, tokenizer):
        progress.warning(warning)
    items = _plan(checkpoint, schemes, source.decoder)
    if not source.writes:
        return {}
    files |= _write_shards(
        checkpoint, source, _shards(items, options.shard_bytes), folder, progress
    )
    if schemes.rules:
        bits = folder / BITS_FILE
        bits.write_text(schemes.as_text(), encoding="utf-8")
        files[BITS_FILE] = sha256_file(bits)
    meta = _meta(checkpoint, schemes, items, files, source)
    meta["config"] |= _generation(checkpoint, tokenizer)
    write_json(folder / QUANT_JSON, meta)
    formats.write(options.format, read_quant(folder, verify=False))
    progress.finish()
    if options.work is None:
        source.pieces.remove()
    sizes = meta["sizes"]
    summary = (
        f"{sizes['bits_per_weight']:.2f} bits per weight, "
        f"{sizes['model_float_bytes'] / 1e6:.0f} -> {sizes['model_quant_bytes'] / 1e6:.0f} MB"
    )
    if "head" in meta:
        assert schemes.head is not None
        summary += f", head {schemes.head.label}"
    return {"summary": summary, **sizes, **source.cost}


def _write_shards(
    checkpoint: Checkpoint,
    source: QuantSource,
    shards: list[list[StoredItem]],
    folder: Path,
    progress: Progress,
) -> dict[str, str]:
    """Weight files, one tensor in memory at a time; {name: SHA-256}."""
    progress.start(QUANT, sum(map(len, shards)))
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [spec for item in shard for spec in item.specs]
        tensors = [(spec.name, dtype_name(spec.dtype), spec.shape) for spec in specs]
        made_of = digest(source.made_of, tensors)
        if source.pieces.whole(name, made_of):
            progress.skip(len(shard))
        else:
            with source.pieces.made(name, made_of) as path, SafetensorsWriter(path, specs) as file:
                for item in shard:
                    for array in _arrays(checkpoint, source, item):
                        file.write(array)
                    progress.advance(1, item.name)
        source.pieces.give(name, folder)
        files[name] = source.pieces.recorded(name)
    return files


def quant_bytes(
    checkpoint: Checkpoint, schemes: QuantScheme | SchemeMap, format_name: str = formats.OURS
) -> int:
    """Upper estimate of what quantize_model writes, to check the free space first."""
    # A method may untie the head. Its finished blocks lie on the disk while the folder is written;
    # so may another format.
    schemes = as_map(schemes)
    items = _plan(checkpoint, schemes, checkpoint.decoder.with_floats(schemes.floats).untied())
    total = sum(spec.nbytes for item in items for spec in item.specs)
    copies = 2 if format_name == formats.OURS else 3
    return copies * total + total // 50 + (1 << 24)  # headers and tokenizer


def kept_bytes(out: Path) -> int:
    """What quant_bytes counts and an interrupted run has left in OUT: it is gone on with, or makes
    room. Streams are not in that estimate; a weight file that a finished quant/ has too makes none.
    """
    return folder_bytes(out / WORK, "*.safetensors", besides=out / QUANT)


# ---------------------------------------------------------------- what is written


def _plan(checkpoint: Checkpoint, schemes: SchemeMap, decoder: Decoder) -> list[StoredItem]:
    scheme_of = partial(schemes.of, decoder=decoder)
    return list(stored_items(decoder, schemes.base, scheme_of))


def _shards(items: list[StoredItem], limit: int) -> list[list[StoredItem]]:
    shards: list[list[StoredItem]] = [[]]
    filled = 0
    for item in items:
        size = sum(spec.nbytes for spec in item.specs)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _arrays(checkpoint: Checkpoint, source: QuantSource, item: StoredItem) -> Iterator[np.ndarray]:
    if item.kind == "float":
        yield _cast(
            f"{checkpoint.source.path}, tensor {item.name}",
            source.rest(item.name),
            item.scheme.dtype,
        )
    elif item.kind == "rope":
        yield checkpoint.rope(item.name)[0]
    elif item.kind == "order":
        yield source.order(item.name)
    else:
        arrays = source.linear(item.name, item.scheme).named()
        for spec in item.specs:
            yield arrays[spec.name.rpartition(".")[2]]


def _cast(where: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(numpy_dtype(dtype))
    if dtype == "float16" and array.dtype != cast.dtype and not np.isfinite(cast).all():
        raise InputError(
            where,
            f"got {np.abs(array).max():g}, expected at most 65504 to fit float16",
            "Use --dtype bfloat16 or float32",
        )
    return cast


def _save_tokenizer(tokenizer: Any, folder: Path) -> dict[str, str]:
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            "the model's tokenizer",
            f"got one that transformers cannot save ({reason(error)})",
            "Put another tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in config.items() if key not in _LEFT_OUT})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): sha256_file(file) for file in files}


# ---------------------------------------------------------------- quant.json


def _meta(
    checkpoint: Checkpoint,
    schemes: SchemeMap,
    items: list[StoredItem],
    files: dict[str, str],
    quantised: QuantSource,
) -> dict[str, Any]:
    source, exceptions = checkpoint.source, schemes.exceptions(checkpoint.decoder)
    layers = (
        {"layers": {node: scheme.as_dict() for node, scheme in exceptions.items()}}
        if exceptions
        else {}
    )
    head = {}
    if quantised.decoder.head.quantized:
        assert schemes.head is not None
        head = {"head": schemes.head.as_dict()}
    reordered = list(quantised.decoder.orders)
    ordered = {"reordered": reordered} if reordered else {}
    floats = {"floats": list(schemes.floats)} if schemes.floats else {}
    return {
        "format": FORMAT,
        "family": checkpoint.family.name,
        "source": {
            "name": checkpoint.name,
            "kind": source.kind,
            "hub_id": source.hub_id,
            "fingerprint": checkpoint.fingerprint,
        },
        "config": _model_config(checkpoint, quantised.decoder.tied),
        "scheme": schemes.base.as_dict(),
        **layers,
        **head,
        **ordered,
        **floats,
        "files": files,
        "sizes": _sizes(items),
        "calibration": quantised.facts,
    }


def _model_config(checkpoint: Checkpoint, tied: bool) -> dict[str, Any]:
    config = checkpoint.config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    values = {name: getattr(config, name, None) for name in names}
    values["head_dim"] = checkpoint.decoder.blocks[0].heads.head_dim
    untied = {} if tied else {"tie_word_embeddings": False}
    scalings = {name: checkpoint.rope(name)[1] for name in checkpoint.decoder.frequencies}
    scaling = scalings if len(scalings) > 1 else next(iter(scalings.values()), 1.0)
    hf = checkpoint.hf_config() | untied
    return values | untied | {"rope_attention_scaling": scaling, "hf": hf}


def _generation(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    """What else is to be known to make text: every end token, where config.json lacks some, and how
    tokens are chosen, where the checkpoint says so.

    Models made for chat often end a turn with another token than a text.
    """
    made, known = checkpoint.generation, token_list(checkpoint.config.eos_token_id)
    own = token_list(tokenizer.eos_token_id)
    wanted = list(dict.fromkeys((*known, *made.end_tokens, *own)))
    found: dict[str, Any] = {"eos_token_id": wanted} if set(wanted) != set(known) else {}
    return found | ({} if made.sampling is None else {"sampling": asdict(made.sampling)})


def _warnings(checkpoint: Checkpoint, tokenizer: Any) -> Iterator[str]:
    yield from checkpoint.warnings
    vocab = checkpoint.decoder.vocab
    beyond = {token: name for name, token in tokenizer.get_vocab().items() if token >= vocab}
    if beyond:
        first, tokens = min(beyond), "1 token" if len(beyond) == 1 else f"{len(beyond)} tokens"
        yield (
            f"The tokenizer has {tokens} beyond the model's vocab_size of {vocab}, the first "
            f"{beyond[first]!r} with id {first}: a text with one of them will be refused."
        )
    ends = {*token_list(checkpoint.config.eos_token_id), *checkpoint.generation.end_tokens}
    if never := sorted(token for token in ends if token >= vocab):
        yield (
            f"End tokens beyond the model's vocab_size of {vocab} ({', '.join(map(str, never))}) "
            f"will never end a text."
        )
    if checkpoint.generation.not_followed:
        asked = ", ".join(checkpoint.generation.not_followed)
        yield f"generation_config.json asks for {asked}, which python -m deploy does not follow."


def _sizes(items: list[StoredItem]) -> dict[str, Any]:
    """Bytes before (in scheme.dtype) and bits after, with scales and zero points, without the
    kernels' padding. Linears that stay in floating point count as linears.
    """
    width = numpy_dtype(items[0].scheme.dtype).itemsize
    weights, bits, rest = 0, 0, 0
    for item in items:
        if item.bits:
            weights += math.prod(item.specs[0].shape)
            bits += item.bits
        else:
            rest += sum(spec.nbytes for spec in item.specs)
    return {
        "linear_weights": weights,
        "linear_float_bytes": weights * width,
        "linear_quant_bits": bits,
        "bits_per_weight": round(bits / weights, 4),
        "rest_bytes": rest,
        "model_float_bytes": weights * width + rest,
        "model_quant_bytes": bits // 8 + rest,
    }
