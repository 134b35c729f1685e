"""GGUF files made on the spot: whole models as llama.cpp's converter writes them, and single bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from calibration.checkpoints.checkpoint import Checkpoint

STRING, ARRAY, UINT32 = 8, 9, 4


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    blocks: Mapping[str, tuple[str, np.ndarray]] | None = None,
    unstacked: bool = False,
    **options: Any,
) -> Path:
    """Write a checkpoint as GGUF in fp32, with RoPE as llama.cpp's converter would.

    Args:
        path: of the file; gguf adds the number of each part where options ask for several.
        checkpoint: of a family that such files are read of.
        metadata: more keys, or other values of those that there are.
        extra: more tensors.
        blocks: {name: (type, bytes [rows, bytes of a row])} of tensors that are quantized.
        unstacked: a tensor for each expert, as llama.cpp had them first.
        options: of GGUFWriter, such as split_max_tensors.
    """
    config, family = checkpoint.config, checkpoint.family
    writer = gguf.GGUFWriter(path, family.gguf, **options)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if family.name != "llama":
        sizes["attention.key_length"] = checkpoint.decoder.blocks[0].heads.head_dim
    own = {key: getattr(config, name, None) for key, name in family.gguf_fields.items()}
    sizes |= {key: value for key, value in own.items() if value is not None}
    if rope := checkpoint.decoder.blocks[0].rope:
        sizes |= {} if rope.width is None else {"rope.dimension_count": rope.width}
    values = {
        **{f"{family.gguf}.{key}": value for key, value in sizes.items()},
        **rope_metadata(config.rope_parameters, family.gguf),
        **tokenizer_metadata(checkpoint.source.path),
        **(metadata or {}),
    }
    for key, value in values.items():
        add_value(writer, key, value)
    tensors = {**_tensors(checkpoint), **_rope_factors(checkpoint), **(extra or {})}
    for name, array in tensors.items():
        kind, whole = (blocks or {}).get(name, (None, array))
        raw = None if kind is None else gguf.GGMLQuantizationType[kind]
        for part, data in _apart(name, whole) if unstacked else [(name, whole)]:
            writer.add_tensor(part, np.ascontiguousarray(data), raw_dtype=raw)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything and close."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value of the type that Python's has."""
    kinds = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def write_metadata(path: Path, values: Mapping[str, Any], architecture: str = "llama") -> Path:
    """Write a GGUF file of these values and no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add_value(writer, key, value)
    finish(writer)
    return path


def rope_metadata(rope: Mapping[str, Any], architecture: str = "llama") -> dict[str, Any]:
    """What llama.cpp's converter writes of a Hugging Face config's rope_parameters."""
    if "full_attention" in rope:
        local = {f"{architecture}.rope.freq_base_swa": rope["sliding_attention"]["rope_theta"]}
        return rope_metadata(rope["full_attention"], architecture) | local
    found: dict[str, Any] = {f"{architecture}.rope.freq_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind == "longrope":
        factor = rope["attention_factor"]
        return found | {f"{architecture}.rope.scaling.attn_factor": float(factor)}
    if kind in ("linear", "yarn"):
        found |= {
            f"{architecture}.rope.scaling.type": kind,
            f"{architecture}.rope.scaling.factor": float(rope["factor"]),
        }
    if kind == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        found |= {
            f"{architecture}.rope.scaling.{name}": rope[hf]
            for hf, name in names.items()
            if rope.get(hf)
        }
    return found


def _rope_factors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors that carry LLaMA 3's scaling, or longrope's."""
    config = checkpoint.config
    if config.rope_parameters.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(
                config.rope_parameters[f"{kind}_factor"], np.float32
            )
            for kind in ("short", "long")
        }
    if config.rope_parameters.get("rope_type") != "llama3":
        return {}
    head = np.arange(0, config.head_dim, 2) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** head
    return {"rope_freqs.weight": (plain / checkpoint.rope()[0]).astype(np.float32)}


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """The byte-level BPE of a tokenizer.json that splits text as GPT-2 does."""
    values = json.loads((folder / "tokenizer.json").read_text())
    special = {one["content"] for one in values["added_tokens"]}
    model = values["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def _tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    config, routers = checkpoint.config, checkpoint.decoder.routers
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for index, block in enumerate(checkpoint.decoder.blocks):
        for part in (*block.norms, *block.linears):
            names[block.name(part.name)] = f"blk.{index}.{part.gguf}"
    names |= {router: f"blk.{block.index}.ffn_gate_inp" for router, (block, _) in routers.items()}
    found: dict[str, np.ndarray] = {}
    for name, info in checkpoint.decoder.infos.items():
        base, _, end = name.rpartition(".")
        array = checkpoint.stored(name).astype(np.float32) + np.float32(info.offset)
        if info.rotary:
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            array = _interleaved(array, getattr(config, heads))
        key = info.gguf if info.whole else f"{names[base]}.{end}"
        array = array if info.expert is None else array[None]
        found[key] = np.concatenate([found[key], array]) if key in found else array
    return found


def _apart(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if "_exps" not in name:
        return [(name, array)]
    return [(name.replace("_exps", f".{index}"), one) for index, one in enumerate(array)]


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp's converter writes for q and k."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


# ---------------------------------------------------------------- bytes


def text(value: str | bytes) -> bytes:
    """A string as GGUF has it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    """A list as a metadata entry's value."""
    return struct.pack("<IQ", kind, count) + values


def info(name: str, shape: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's name, sizes (innermost first), type and place."""
    sizes = list(shape)
    return (
        text(name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", kind, offset)
    )


def gguf_bytes(
    entries: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file; `counts` of tensors and of entries are true unless given."""
    entries, infos = list(entries), list(infos)
    tensors, values = counts or (len(infos), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join((*entries, *infos))
    return head + bytes(-len(head) % 32) + data if infos else head
