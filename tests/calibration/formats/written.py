"""Tiny checkpoints in the formats of other tools, written bit by bit from what their documents say,
with the weights that they stand for.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

__all__ = [
    "Written", "abq_llm", "awq", "bnb4", "bnb8", "fp4", "fp8", "gptq", "hqq", "integers", "packed", "qqq",
]  # fmt: skip

Tensors = dict[str, np.ndarray]

_LINEARS = ("_proj", ".w1", ".w2", ".w3")  # the last three of Mixtral's experts


@dataclass
class Written:
    """A checkpoint, and the float32 weights [N, K] of each quantized layer by the format's formula."""

    folder: Path
    weights: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]


def _write(
    source: Path,
    folder: Path,
    settings: dict[str, Any] | None,
    layer: Callable[
        [str, np.random.Generator, tuple[int, int]], tuple[Tensors, np.ndarray, np.ndarray]
    ],
    left_out: Sequence[str] = (),
    head: bool = False,
) -> Written:
    """A copy of a float checkpoint with every linear but those in `left_out` replaced, and the head
    too if it is to be.
    """
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(5)
    tensors, written = load_file(source / "model.safetensors"), Written(folder, {}, {})
    ends = tuple(f"{end}.weight" for end in (*_LINEARS, *(("lm_head",) if head else ())))
    for name in sorted(name for name in tensors if name.endswith(ends)):
        base = name.removesuffix(".weight")
        if base.rpartition(".")[2] in left_out:
            continue
        found, weight, codes = layer(base, random, tensors.pop(name).shape)
        tensors |= {f"{base}.{end}": array for end, array in found.items()}
        written.weights[base], written.codes[base] = weight, codes
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return written


def _stream(numbers: Sequence[int], bits: int) -> np.ndarray:
    """Numbers one after the other, low bits first, as int32 words."""
    whole = sum(int(number) << bits * place for place, number in enumerate(numbers))
    size = -(-len(numbers) * bits // 32)
    return np.frombuffer(whole.to_bytes(4 * size, "little"), "<i4")


def _columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each column of [n, m] as a stream: [words, m]."""
    return np.stack([_stream(column, bits) for column in codes.T], axis=1)


def _numbers(
    random: np.random.Generator, shape: tuple[int, int], groups: int, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales fp16 [N, G], zero points [N, G]."""
    levels = 1 << bits
    codes = random.integers(0, levels, shape)
    scale = random.uniform(0.02, 0.06, (shape[0], groups)).astype(np.float16)
    zero = random.integers(0, levels, (shape[0], groups))
    zero = np.full_like(zero, levels // 2) if symmetric else zero
    return codes, scale, zero


def gptq(
    source: Path,
    folder: Path,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    symmetric: bool = True,
    ordered: bool = False,
    left_out: Sequence[str] = (),
    head: bool = False,
    **settings: Any,
) -> Written:
    """qweight along the input, qzeros along the output, scales, g_idx."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        size = shape[1] if group == -1 else group
        index = np.arange(shape[1]) // size
        expert = int(found[1]) if (found := re.search(r"\.experts\.(\d+)\.", name)) else None
        if ordered and expert != 0:  # linears of one node are rounded in one order
            index = np.random.default_rng(shape[1] + (expert or 0)).permutation(index)
        codes, scale, zero = _numbers(random, shape, -(-shape[1] // size), bits, symmetric)
        stored = (zero - (version == 1)) % (1 << bits)
        weight = np.empty(shape, np.float32)
        for k in range(shape[1]):
            steps = (codes[:, k] - zero[:, index[k]]).astype(np.float32)
            weight[:, k] = scale[:, index[k]].astype(np.float32) * steps
        tensors = {
            "qweight": _columns(codes.T, bits),
            "qzeros": np.stack([_stream(row, bits) for row in stored.T]),
            "scales": np.ascontiguousarray(scale.T),
            "g_idx": index.astype(np.int32),
        }
        return tensors, weight, codes

    return _write(
        source,
        folder,
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": ordered,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            **settings,
        },
        layer,
        left_out,
        head,
    )


def awq(source: Path, folder: Path, group: int = 32, **settings: Any) -> Written:
    """Words of eight output channels in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def words(codes: np.ndarray) -> np.ndarray:  # [n, N] -> [n, N / 8]
        places = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return np.stack([np.concatenate([_stream(word, 4) for word in row]) for row in places])

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        size = shape[1] if group == -1 else group
        codes, scale, zero = _numbers(random, shape, shape[1] // size, 4, False)
        weight = (codes - np.repeat(zero, size, 1)).astype(np.float32)
        weight *= np.repeat(scale, size, 1).astype(np.float32)
        tensors = {
            "qweight": words(codes.T),
            "qzeros": words(zero.T),
            "scales": np.ascontiguousarray(scale.T),
        }
        return tensors, weight, codes

    own = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return _write(source, folder, own | settings, layer)


def packed(
    source: Path,
    folder: Path,
    bits: int,
    group: int | None,
    symmetric: bool,
    actorder: bool = False,
) -> Written:
    """compressed-tensors, pack-quantized."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        size = group or shape[1]
        index = np.arange(shape[1]) // size
        if actorder:
            index = np.random.default_rng(shape[1]).permutation(index)
        codes, scale, zero = _numbers(random, shape, shape[1] // size, bits, symmetric)
        weight = (codes - zero[:, index]).astype(np.float32) * scale[:, index].astype(np.float32)
        tensors = {
            "weight_packed": np.stack([_stream(row, bits) for row in codes]),
            "weight_shape": np.array(shape, np.int64),
            "weight_scale": scale,
        }
        if not symmetric:
            tensors["weight_zero_point"] = _columns(zero, bits)
        if actorder:
            tensors["weight_g_idx"] = index.astype(np.int32)
        return tensors, weight, codes

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "actorder": "group" if actorder else None,
    }
    return _write(source, folder, _compressed("pack-quantized", weights, None), layer)


def integers(
    source: Path, folder: Path, bits: int, group: int | None = None, symmetric: bool = True
) -> Written:
    """compressed-tensors, int-quantized, with 8-bit activations."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        size, half = group or shape[1], 1 << bits - 1
        codes, scale, zero = _numbers(random, shape, shape[1] // size, bits, symmetric)
        weight = (codes - np.repeat(zero, size, 1)).astype(np.float32)
        weight *= np.repeat(scale, size, 1).astype(np.float32)
        tensors = {"weight": (codes - half).astype(np.int8), "weight_scale": scale}
        if not symmetric:
            tensors["weight_zero_point"] = (zero - half).astype(np.int8)
        return tensors, weight, codes

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return _write(source, folder, _compressed("int-quantized", weights, activations), layer)


def _compressed(
    name: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def qqq(source: Path, folder: Path, group: int) -> Written:
    """Tiles of 16 x 64 for the threads of a warp; see the layout in plugins/qqq_gemm/README.md."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        rows, columns = shape
        grouped = group > 0 and columns > group  # else it is a scale per output channel
        low = -8 if grouped else -7
        codes = random.integers(low, 8, shape)
        channel = random.uniform(0.002, 0.006, rows).astype(np.float32)
        words = np.zeros((columns // 16, 2 * rows), np.uint32)
        order = (
            [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]
            if grouped
            else [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2), (1, 3), (0, 3)]
        )
        for tile in range(columns // 16):
            for word in range(2 * rows):
                block, lane, j = word // 128, word % 128 // 4, word % 4
                for place, (b, r) in enumerate(order):
                    n = 64 * block + 16 * j + 8 * b + lane // 4
                    code = int(codes[n, 16 * tile + 4 * (lane % 4) + r])
                    nibble = code + 8 if grouped else code & 15
                    words[tile, word] |= np.uint32(nibble << 4 * place)
        tensors = {"B": words.view(np.int32)}
        single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        stored = channel if grouped else channel / np.float32(16)
        tensors["s_channel"] = stored.reshape(-1, 32)[:, single].reshape(1, -1)
        if not grouped:
            tensors["s_group"] = np.zeros(0, np.float16)
            return tensors, codes.astype(np.float32) * channel[:, None], codes
        scale = random.uniform(2, 15, (rows, columns // 128)).astype(np.float16)
        both = [i + 8 * j for i in range(8) for j in range(8)]
        tensors["s_group"] = scale.T.reshape(-1, 64)[:, both].reshape(scale.T.shape)
        whole = np.rint(codes * np.repeat(scale, 128, 1).astype(np.float32))
        return tensors, whole.astype(np.float32) * channel[:, None], codes

    settings = {"quant_method": "qqq", "wbits": 4, "group_size": group}
    return _write(source, folder, settings, layer)


def abq_llm(source: Path, folder: Path, levels: int, group: int | None = None) -> Written:
    """Rounded weights in fp16, with the scales and zero points, and what else is left in there."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        size = group or shape[1]
        codes = random.integers(0, levels, shape)
        scale = random.uniform(0.02, 0.06, (shape[0], shape[1] // size)).astype(np.float16)
        zero = random.integers(0, levels, scale.shape)
        weight = (codes - np.repeat(zero, size, 1)).astype(np.float32)
        weight *= np.repeat(scale, size, 1).astype(np.float32)
        return (
            {
                "weight": weight.astype(np.float16),
                "bias": np.zeros(shape[0], np.float16),
                "weight_quantizer.scales": scale.reshape(-1, 1),
                "weight_quantizer.zeros": zero.astype(np.float16).reshape(-1, 1),
            },
            weight,
            codes,
        )

    return _write(source, folder, None, layer)


def fp8(source: Path, folder: Path, block: tuple[int, int] | None) -> Written:
    """e4m3 with a scale for each block, or for the tensor."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        weight = random.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        height, width = block or shape
        grid = -(-shape[0] // height), -(-shape[1] // width)
        scale = random.uniform(0.01, 0.02, grid).astype(np.float32)
        rows, columns = np.arange(shape[0]) // height, np.arange(shape[1]) // width
        values = weight.astype(np.float32) * scale[rows][:, columns]
        stored = scale if block else scale.reshape(())
        return {"weight": weight, "weight_scale_inv": stored}, values, weight

    settings = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    return _write(source, folder, settings, layer)


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]


def bnb4(
    source: Path,
    folder: Path,
    kind: str = "nf4",
    nested: bool = False,
    block: int = 64,
    storage: Any = np.uint8,
) -> Written:
    """bitsandbytes: two places in a table to a byte, the first in the high bits; blocks over the
    whole matrix.
    """
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        codes = random.integers(0, 16, shape)
        flat, count = codes.reshape(-1), -(-codes.size // block)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
        absmax = random.uniform(0.05, 0.2, count).astype(np.float32)
        tensors = {"weight.absmax": absmax, "weight.quant_map": table}
        if nested:
            places, map8 = random.integers(0, 256, count), random.uniform(-1, 1, 256)
            offset = float(np.float32(0.1))
            tensors |= {
                "weight.absmax": places.astype(np.uint8),
                "weight.nested_absmax": random.uniform(0.02, 0.05, -(-count // 8)).astype("f4"),
                "weight.nested_quant_map": map8.astype(np.float32),
            }
            state |= {"nested_blocksize": 8, "nested_offset": offset, "nested_dtype": "float32"}
            for place in range(count):
                scaled = (
                    np.float32(map8[places[place]]) * tensors["weight.nested_absmax"][place // 8]
                )
                absmax[place] = scaled + np.float32(offset)
        weight = np.array(
            [table[code] * absmax[place // block] for place, code in enumerate(flat)], np.float32
        )
        told = json.dumps(state | {"shape": shape}).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(told, np.uint8)
        words = (flat[::2] << 4 | flat[1::2]).astype(np.uint8).view(storage)
        return tensors | {"weight": words.reshape(-1, 1)}, weight.reshape(shape), codes

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return _write(source, folder, settings, layer)


def bnb8(source: Path, folder: Path) -> Written:
    """LLM.int8(): codes by the largest magnitude of their row, SCB."""

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        codes = random.integers(-127, 128, shape).astype(np.int8)
        largest = random.uniform(0.1, 0.3, shape[0]).astype(np.float32)
        tensors = {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}
        weight = codes.astype(np.float32) * (largest / np.float32(127))[:, None]
        return tensors, weight, codes.astype(np.int32) + 128

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return _write(source, folder, settings, layer)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp4(
    source: Path, folder: Path, kind: str, activations: dict[str, Any] | None = None
) -> Written:
    """compressed-tensors, mxfp4-pack-quantized and nvfp4-pack-quantized."""
    size = {"mxfp4": 32, "nvfp4": 16}[kind]

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        bits = random.integers(0, 16, shape)
        values = np.array([*E2M1, *(-value for value in E2M1)], np.float32)[bits]
        tensors: Tensors = {"weight_packed": (bits[:, ::2] | bits[:, 1::2] << 4).astype(np.uint8)}
        groups = (shape[0], shape[1] // size)
        if kind == "mxfp4":
            exponents = random.integers(115, 125, groups).astype(np.uint8)
            tensors["weight_scale"] = exponents
            scale = np.exp2(exponents.astype(np.float32) - 127)
        else:
            local = random.uniform(0.5, 400, groups).astype(ml_dtypes.float8_e4m3fn)
            whole = random.uniform(3000, 9000, 1).astype(np.float32)
            tensors |= {"weight_scale": local, "weight_global_scale": whole}
            scale = local.astype(np.float32) / whole
        weight = values * np.repeat(scale, size, 1)
        return tensors, weight, (2 * values + 12).astype(np.int32)

    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group" if kind == "mxfp4" else "tensor_group",
        "group_size": size,
    }
    return _write(
        source, folder, _compressed(f"{kind}-pack-quantized", weights, activations), layer
    )


def hqq(
    source: Path,
    folder: Path,
    bits: float = 4,
    group: int = 32,
    axis: int = 1,
    dtype: Any = np.float16,
    as_float: bool = False,
) -> Written:
    """A matrix cut into groups, then packed along its first axis; all settings are tensors."""
    packings = {8: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
    whole = int(np.ceil(bits))
    packing, levels = packings[whole], round(2**bits)
    width = int(packing[0])
    count = 10 if width == 3 else 8 // width

    def layer(
        name: str, random: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Tensors, np.ndarray, np.ndarray]:
        groups = shape[0] * shape[1] // group
        cut = (groups, group) if axis else (group, groups)
        codes = random.integers(0, levels, cut)
        scale = random.uniform(0.02, 0.06, (groups, 1) if axis else (1, groups)).astype(dtype)
        zero = random.uniform(-0.3, levels, scale.shape).astype(dtype)
        steps = -(-cut[0] // count)
        words = np.zeros((steps, cut[1]), np.int64)
        for row in range(cut[0]):  # the first rows are in the highest bits
            words[row % steps] |= codes[row] << width * (count - 1 - row // steps)
        packed = words.astype(np.int32 if width == 3 else np.uint8)
        tensors = {
            "W_q": packed.view(np.float16) if as_float else packed,
            "scale": scale,
            "zero": zero,
            "shape": np.array(shape, np.int64),
            "nbits": np.array(bits, np.int32 if whole == bits else np.float32),
            "packing": np.frombuffer(packing.encode(), np.uint8),
            **{
                key: np.array(value, np.int32)
                for key, value in (("group_size", group), ("axis", axis))
            },
            **{key: np.array(0, np.uint8) for key in ("quant_scale", "quant_zero", "offload_meta")},
            "view_as_float": np.array(as_float, np.uint8),
        }
        # codes that are kept stand for numbers that are rounded once
        kept = axis == 1 and shape[1] % group == 0 and dtype != np.float32
        kind = np.float64 if kept else np.float32
        weight = (codes.astype(kind) - zero.astype(kind)) * scale.astype(kind)
        return tensors, weight.astype(np.float32).reshape(shape), codes.reshape(shape)

    settings = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    return _write(source, folder, settings, layer)
