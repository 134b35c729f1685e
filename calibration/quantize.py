"""Turns a float model into the quant folder, one tensor at a time: bounded memory, the same bytes every time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration import formats
from calibration.artifact import sha256_file, write_json
from calibration.data import load_text, tokens_from_text
from calibration.methods import Method, method
from calibration.progress import NullProgress
from calibration.quant_folder import FORMAT, QUANT_JSON, read_quant
from calibration.safetensors_io import SafetensorsWriter, TensorSpec, numpy_dtype
from plugins import op_spec
from plugins.core.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoint import Checkpoint
    from calibration.progress import Progress
    from calibration.scheme import QuantScheme
    from plugins.core.op_spec import QuantArrays

__all__ = ["STAGE", "QuantizeOptions", "check_scheme", "quant_bytes", "quantize_model"]

STAGE = "quant"
SHARD_BYTES = 2 * 10**9
QQQ_GROUPS = (0, 64, 128)
_MIN_GROUP = 16
_MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")  # of tokenizer_config.json


@dataclass(frozen=True)
class QuantizeOptions:
    """Where the model and the calibration text come from, and how the result is cut into files.

    Attributes:
        offline: never touch the network.
        calib: text file or dataset; checked when given, even if the method does not read it.
        nsamples, seqlen: calibration windows and their tokens.
        shard_bytes: largest weight file.
        format: one of calibration.formats, written into the quant folder too.
    """

    offline: bool = False
    calib: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    shard_bytes: int = SHARD_BYTES
    format: str = formats.OURS


def quantize_model(checkpoint: Checkpoint, scheme: QuantScheme, options: QuantizeOptions, folder: Path,
                   progress: Progress | None = None) -> dict[str, Any]:
    """Quantise a checkpoint into an existing empty folder (OUT/quant, through a StageWriter).

    Returns:
        Facts for the manifest: "summary" and the sizes.

    Raises:
        InputError: settings that do not fit this model or the format, NaN in its weights, calibration text that is too short.
    """
    progress = progress or NullProgress()
    check_scheme(checkpoint, scheme, options.format)
    tokenizer = checkpoint.tokenizer()
    if options.calib is not None:
        tokens_from_text(tokenizer, load_text(options.calib, options.offline), options.nsamples, options.seqlen)
    items = _plan(checkpoint, scheme)
    shards = _shards(items, options.shard_bytes)
    progress.start(STAGE, len(items))
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / name, [spec for item in shard for spec in item.specs]) as file:
            for item in shard:
                for array in _arrays(checkpoint, scheme, item):
                    file.write(array)
                progress.advance(1, item.name)
        files[name] = file.sha256
    files |= _save_tokenizer(tokenizer, folder)
    meta = _meta(checkpoint, scheme, items, files)
    write_json(folder / QUANT_JSON, meta)
    formats.write(options.format, read_quant(folder, verify=False))
    progress.finish()
    sizes = meta["sizes"]
    summary = (f"{sizes['bits_per_weight']:.2f} bits per weight, "
               f"{sizes['model_float_bytes'] / 1e6:.0f} -> {sizes['model_quant_bytes'] / 1e6:.0f} MB")
    return {"summary": summary, **sizes}


def quant_bytes(checkpoint: Checkpoint, scheme: QuantScheme, format: str = formats.OURS) -> int:
    """Upper estimate of what quantize_model writes, to check the free space first."""
    total = sum(spec.nbytes for item in _plan(checkpoint, scheme) for spec in item.specs)
    total += total // 50 + (1 << 24)  # headers and tokenizer
    return total if format == formats.OURS else 2 * total  # no format needs more than a byte per code


# ---------------------------------------------------------------- settings


def check_scheme(checkpoint: Checkpoint, scheme: QuantScheme, format: str = formats.OURS) -> None:
    """Settings against this model's layers, before any work.

    Raises:
        InputError: bits, group size, op or output format do not fit.
    """
    formats.check(format, scheme, checkpoint)
    bits = f"W{scheme.wbits}{'*' if scheme.balanced else ''}A{scheme.abits}"
    if scheme.op == "QQQGemm" and ((scheme.wbits, scheme.abits, scheme.balanced) != (4, 8, False) or not scheme.act_symmetric):
        raise InputError("QQQGemm", f"got {bits}{'' if scheme.act_symmetric else ' with asymmetric activations'}, "
                         "expected W4A8 with symmetric activations", "Use --wbits 4 --abits 8, or --method abq for other bits")
    shapes = sorted({checkpoint.family.linear_shape(linear, checkpoint.dims) for linear in checkpoint.family.linears()})
    _check_group(scheme, [in_features for _, in_features in shapes])
    for out_features, in_features in shapes:
        where = f"a linear layer of {out_features} x {in_features}"
        op_spec(scheme.op).check(scheme.attributes(out_features, in_features, False), where)


def _check_group(scheme: QuantScheme, widths: list[int]) -> None:
    size = scheme.group_size
    common = reduce(math.gcd, widths)
    qqq = scheme.op == "QQQGemm"
    fitting = [n for n in range(_MIN_GROUP, common + 1) if common % n == 0 and (not qqq or n in QQQ_GROUPS)]
    if size == 0 or (size in fitting):
        return
    choices = f"Use --group-size 0 (one scale per output channel){' or ' + ', '.join(map(str, fitting)) if fitting else ''}"
    if qqq and size not in QQQ_GROUPS:
        raise InputError("--group-size", f"got {size}, expected 0, 64 or 128 for QQQGemm",
                         f"{choices}; --method abq takes other sizes")
    if size < _MIN_GROUP:
        raise InputError("--group-size", f"got {size}, expected 0 or at least {_MIN_GROUP}", choices)
    bad = ", ".join(str(width) for width in sorted(set(widths)) if width % size)
    raise InputError("--group-size", f"got {size}, which does not divide the in_features {bad} of this model's linear layers",
                     choices)


# ---------------------------------------------------------------- what is written


@dataclass(frozen=True)
class _Item:
    """A float tensor ("float"), a quantised linear ("linear") or the rotary frequencies ("rope"), with its tensors to write."""

    kind: str
    name: str
    specs: tuple[TensorSpec, ...]


def _plan(checkpoint: Checkpoint, scheme: QuantScheme) -> list[_Item]:
    family, dims = checkpoint.family, checkpoint.dims
    linears = {f"{family.layer(i)}.{linear.name}": linear for i in range(dims.layers) for linear in family.linears()}
    rest = numpy_dtype(scheme.dtype)
    items = []
    for name, shape in family.tensor_shapes(dims):
        base, _, end = name.rpartition(".")
        if base not in linears:
            items.append(_Item("float", name, (TensorSpec(name, rest, shape),)))
        elif end == "weight":
            specs = _linear_specs(base, (shape[0], shape[1]), family.has_bias(linears[base], dims), scheme)
            items.append(_Item("linear", base, tuple(specs)))
    frequencies = checkpoint.rope()[0]
    return [*items, _Item("rope", "rope.inv_freq", (TensorSpec("rope.inv_freq", np.dtype(np.float32), frequencies.shape),))]


def _linear_specs(name: str, shape: tuple[int, int], has_bias: bool, scheme: QuantScheme) -> Iterator[TensorSpec]:
    rows, groups = shape[0], scheme.attributes(*shape, has_bias).n_groups
    qqq, fp32 = scheme.op == "QQQGemm", np.dtype(np.float32)
    yield TensorSpec(f"{name}.codes", np.dtype(np.int8 if qqq else np.uint8), shape)
    yield TensorSpec(f"{name}.scale", fp32, (rows, 1 if qqq else groups))
    if not qqq:
        yield TensorSpec(f"{name}.zero", np.dtype(np.int32), (rows, groups))
    elif scheme.group_size:
        yield TensorSpec(f"{name}.scale_group", np.dtype(np.float16), (rows, groups))
    if has_bias:
        yield TensorSpec(f"{name}.bias", fp32, (rows,))


def _shards(items: list[_Item], limit: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        size = sum(spec.nbytes for spec in item.specs)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _arrays(checkpoint: Checkpoint, scheme: QuantScheme, item: _Item) -> Iterator[np.ndarray]:
    if item.kind == "float":
        yield _cast(f"{checkpoint.source.path}, tensor {item.name}", checkpoint.array(item.name), scheme.dtype)
    elif item.kind == "rope":
        yield checkpoint.rope()[0]
    else:
        has_bias = item.specs[-1].name.endswith(".bias")
        bias = checkpoint.array(f"{item.name}.bias") if has_bias else None
        maker: Method = method(scheme.method)
        arrays: QuantArrays = maker.quantize(checkpoint.array(f"{item.name}.weight"), bias, scheme)
        for spec in item.specs:
            yield getattr(arrays, spec.name.rpartition(".")[2])


def _cast(where: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(numpy_dtype(dtype))
    if dtype == "float16" and array.dtype != cast.dtype and not np.isfinite(cast).all():
        raise InputError(where, f"got {np.abs(array).max():g}, expected at most 65504 to fit float16",
                         "Use --dtype bfloat16 or float32")
    return cast


def _save_tokenizer(tokenizer: Any, folder: Path) -> dict[str, str]:
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in config.items() if key not in _MACHINE_KEYS})
    files = sorted(path for path in folder.iterdir() if path.suffix != ".safetensors")
    return {file.name: sha256_file(file) for file in files}


# ---------------------------------------------------------------- quant.json


def _meta(checkpoint: Checkpoint, scheme: QuantScheme, items: list[_Item], files: dict[str, str]) -> dict[str, Any]:
    source = checkpoint.source
    return {
        "format": FORMAT, "family": checkpoint.family.name,
        "source": {"name": checkpoint.name, "kind": source.kind, "hub_id": source.hub_id,
                   "fingerprint": checkpoint.fingerprint},
        "config": _model_config(checkpoint), "scheme": scheme.as_dict(), "files": files, "sizes": _sizes(items, scheme),
    }


def _model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    values = {name: getattr(config, name) for name in names}
    values["head_dim"] = values["head_dim"] or config.hidden_size // config.num_attention_heads
    return values | {"rope_attention_scaling": checkpoint.rope()[1], "hf": checkpoint.hf_config()}


def _sizes(items: list[_Item], scheme: QuantScheme) -> dict[str, Any]:
    """Bytes before (in scheme.dtype) and bits after, with scales and zero points, without the kernels' padding."""
    width = numpy_dtype(scheme.dtype).itemsize
    code_bits = scheme.attributes(1, 1, False).planes if scheme.op == "ABQGemm" else scheme.wbits
    weights, bits, rest = 0, 0, 0
    for item in items:
        for spec in item.specs:
            if item.kind != "linear":
                rest += spec.nbytes
            elif spec.name.endswith(".codes"):
                weights += math.prod(spec.shape)
                bits += math.prod(spec.shape) * code_bits
            else:
                bits += spec.nbytes * 8
    return {
        "linear_weights": weights, "linear_float_bytes": weights * width, "linear_quant_bits": bits,
        "bits_per_weight": round(bits / weights, 4), "rest_bytes": rest,
        "model_float_bytes": weights * width + rest, "model_quant_bytes": bits // 8 + rest,
    }
