"""A KV cache of few bits: what the options say, what it gives back, and that training, calibration
and reference give the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.blocks.forward import float_linear
from calibration.blocks.walk import Streams, WalkBlock, site_weight, walk
from calibration.cli import add_quant_arguments, default_out, scheme_from_args, schemes_from_args
from calibration.methods.abq import method as abq
from calibration.methods.abq.settings import AbqSettings
from calibration.methods.abq.train import tune_block
from calibration.methods.abq.training import TrainSettings
from calibration.methods.abq.tuned import TunedStudent
from calibration.quant.bits import Rule, SchemeMap
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from calibration.reference.fake_quant import quantize_cache, round_to
from calibration.reference.model import quantised_model
from calibration.reference.steps import cached_heads
from calibration.solvers.grid import search_grid
from calibration.transforms.smoothing import adaptive_scales
from plugins.core.activation import quantize_activation
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from tests.calibration.block_cases import block_task, calibrate_tiny
from tests.calibration.llama import INPUT_NORM, POST_NORM, QKV, attend, heads_from_qkv, rms_norm

W4A8 = QuantScheme("ABQGemm", "abq", 4, 8)
IDS = torch.arange(48).reshape(2, 24) * 7 % 512


# ---------------------------------------------------------------- options and the folder


def _args(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_quant_arguments(parser)
    return parser.parse_args(["llama-7b", "--wbits", "4", "--abits", "8", *line.split()])


@pytest.mark.parametrize(
    ("line", "bits", "end"),
    [
        ("", 16, ""),
        ("--kv-bits 16", 16, ""),
        ("--kv-bits 4", 4, "-kv4"),
        ("--kv-bits 8 --group-size 64", 8, "-g64-kv8"),
    ],
)
def test_the_option_is_in_the_scheme_and_in_the_folders_name(
    line: str, bits: int, end: str
) -> None:
    args = _args(line)
    scheme = scheme_from_args(args)
    assert (scheme.kv_bits, scheme.model_label) == (bits, f"w4a8{end}")
    assert default_out(args, scheme) == Path(f"out/llama-7b-w4a8{end}")
    assert QuantScheme(**scheme.as_dict()) == scheme


@pytest.mark.parametrize("bits", ["1", "0", "9", "15", "32", "-4"])
def test_other_widths_are_refused(bits: str) -> None:
    with pytest.raises(InputError) as caught:
        scheme_from_args(_args(f"--kv-bits {bits}"))
    assert (
        str(caught.value)
        == f"--kv-bits: got {bits}, expected 2 to 8, or 16 for a KV cache in floating point. "
        f"Give one of these."
    )


def test_the_other_format_has_no_word_for_it() -> None:
    with pytest.raises(InputError) as caught:
        schemes_from_args(_args("--kv-bits 4 --format compressed-tensors"))
    assert str(caught.value) == (
        "--format compressed-tensors: got a KV cache of 4 bits, expected 16: the format has no "
        "word for ours. "
        "Leave out --kv-bits, or leave out --format."
    )


def test_rules_say_nothing_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "bits.txt").write_text("down_proj w8a8\nlayers.0.* w4a8-g0\n")
    args = _args(f"--kv-bits 4 --head-bits 16 --bits-file {tmp_path / 'bits.txt'}")
    schemes = schemes_from_args(args)
    assert [(scheme.label, scheme.kv_bits) for scheme in schemes.schemes()] == [
        ("w4a8", 4),
        ("w8a8", 4),
    ]
    assert default_out(args, schemes.base) == Path("out/llama-7b-w4a8-kv4-mixed")
    assert (
        schemes.as_text().splitlines()[0]
        == "# Over a base of w4a8-kv4; the last line that matches counts."
    )
    assert SchemeMap.from_dict(json.loads(json.dumps(schemes.as_dict()))) == SchemeMap(
        schemes.base, schemes.rules
    )
    assert Rule("*", "w4a8").scheme(schemes.base) == schemes.base


def test_the_folder_carries_it(tiny_quant: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_quant(kv_bits=4, rules=("down_proj w8a8",)) / "quant"
    quant = read_quant(folder)
    assert quant.label == "w4a8-kv4-mixed" and {scheme.kv_bits for scheme in quant.schemes} == {4}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "quant.json"
    meta = json.loads(path.read_text())
    node = "model.layers.1.mlp.down_proj"
    meta["layers"][node]["kv_bits"] = 8
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError) as caught:
        read_quant(tmp_path)
    assert str(caught.value) == (
        f"{path}, layers, {node}: got kv_bits 8, expected the model's 4. "
        "The folder is damaged: quantise the model again."
    )


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_token_of_every_head_has_codes_of_its_own(bits: int) -> None:
    """The numpy definition on one row after the other."""
    x = (
        torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(bits))
        * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    )
    cached = quantize_cache(x, bits)
    codes, scale, zero = quantize_activation(x.reshape(-1, 16).numpy(), bits, False)
    np.testing.assert_array_equal(
        cached.reshape(-1, 16).numpy(), (codes - zero).astype(np.float32) * scale
    )
    steps = (
        (cached - x).abs().amax(-1)
        / (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0))
        * (2**bits - 1)
    )
    assert (
        (steps <= 1.01).all() and (steps > 0).all() and steps.median() < 0.6
    )  # half a step, and at one end the zero point's half
    assert max(len(row.unique()) for row in cached.flatten(0, -2)) <= 2**bits
    assert quantize_cache(x, 16) is x


def _reference(quant_folder: Path, **options: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The torch reference, and what goes into its cache: rotated keys and values of each layer,
    call by call.
    """
    model = quantised_model(read_quant(quant_folder / "quant"), **options)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    quantize = model._quantize

    def watched(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys.append(key.clone())
        values.append(value.clone())
        return quantize(key, value)

    model._quantize = watched  # type: ignore[assignment]
    return model, keys, values


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_references_cache_holds_what_attention_reads(
    tiny_quant: Callable[..., Path], bits: int, rounded: bool
) -> None:
    model, keys, values = _reference(tiny_quant(kv_bits=bits), round_activations=rounded)
    cache = model(IDS[:, :20]).cache
    for column in range(20, 24):
        cache = model(IDS[:, column : column + 1], cache=cache).cache
    dtype = "float16" if rounded else "float32"
    assert len(keys) == 2 * 5
    for index, layer in enumerate(cache):
        for stored, parts in zip(layer, (keys, values), strict=True):
            whole = torch.cat(
                parts[index::2], -2
            )  # each token once: what is in the cache is not quantised again
            assert whole.shape == stored.shape == (2, 2, 24, 16)
            assert torch.equal(
                stored, round_to(quantize_cache(whole, bits), dtype)
            ) and not torch.equal(stored, whole)


@pytest.mark.parametrize("rounded", [True, False])
def test_decoding_with_the_cache_equals_one_pass(
    tiny_quant: Callable[..., Path], rounded: bool
) -> None:
    model, _, _ = _reference(
        tiny_quant(8, 16, kv_bits=4, dtype="float32"), round_activations=rounded
    )
    plain = quantised_model(read_quant(tiny_quant(8, 16, dtype="float32") / "quant"), rounded)
    whole, other = model(IDS).logits, plain(IDS).logits
    rest = model(IDS[:, 20:], cache=model(IDS[:, :20]).cache).logits
    torch.testing.assert_close(model(IDS, torch.ones_like(IDS)).logits, whole)
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-4)
    assert (whole - other).norm() > 0.02 * other.norm()


# ---------------------------------------------------------------- what is trained is what runs


def _codes(task: Any) -> Callable[[str, object], QuantArrays]:
    def solve(site: str, moments: object) -> QuantArrays:
        weight, bias = site_weight(task.weights, task.block.sites[site].linears)
        grid = search_grid(weight, task.schemes[site], steps=1)
        group = torch.arange(weight.shape[1]) // (task.schemes[site].group_size or weight.shape[1])
        return grid.arrays(grid.round(weight, group)[0], bias)

    return solve


def _walked(
    model: Path, scheme: QuantScheme
) -> tuple[Any, Any, Streams, dict[str, QuantArrays], dict[str, Tensor]]:
    """A block and its training task before, and the streams, codes and gains behind a walk of it."""
    task = block_task(model, AbqSettings(epochs=1), scheme)
    training = abq._train_task(block_task(model, AbqSettings(epochs=1), scheme))
    gains = {f"{norm}.weight": task.weights[f"{norm}.weight"] for norm in (INPUT_NORM, POST_NORM)}
    arrays = walk(
        WalkBlock(task.block, task.weights, task.rope, task.schemes, gains),
        task.streams,
        _codes(task),
        measure=False,
    )
    return task, training, task.streams, arrays, gains


@pytest.mark.parametrize("bits", [4, 8])
def test_the_block_in_training_is_the_block_that_is_walked(tiny_model_dir: Path, bits: int) -> None:
    _, training, streams, arrays, gains = _walked(tiny_model_dir, replace(W4A8, kv_bits=bits))
    assert (training.kv_bits, training.q_bits) == (bits, 16)
    student = TunedStudent(training, arrays, gains)
    float_cache = TunedStudent(replace(training, kv_bits=16), arrays, gains)
    for index in range(4):
        with torch.no_grad():
            y, other = (
                block.outputs(block(), training.window(training.x_q, index), None)[0]
                for block in (student, float_cache)
            )
        error, effect = (y[0] - streams.quant[index]).norm(), (y - other).norm()
        assert error < 1e-5 * y.norm() and effect > 100 * error, (error, effect)


def test_the_walk_quantises_what_the_quantised_model_caches_and_nothing_of_the_float_one(
    tiny_model_dir: Path,
) -> None:
    ends = {}
    for bits in (16, 4):
        task, _, streams, _, _ = _walked(tiny_model_dir, replace(W4A8, kv_bits=bits))
        ends[bits] = streams
    assert all(torch.equal(ends[16].real[index], ends[4].real[index]) for index in range(4))
    assert all((ends[16].quant[index] - ends[4].quant[index]).norm() > 1e-3 for index in range(4))
    qkv = float_linear(task.weights, task.block)(
        QKV, rms_norm(ends[4].quant[0][None], task.weights[f"{INPUT_NORM}.weight"])
    )
    query, key, value = heads_from_qkv(qkv, task.block, task.rope)
    found, expected = (
        cached_heads(4)(query, key, value),
        (query, quantize_cache(key, 4), quantize_cache(value, 4)),
    )
    assert all(torch.equal(part, whole) for part, whole in zip(found, expected, strict=True))
    assert attend(*found).shape == (1, 32, 64)


def test_training_lowers_the_loss_of_a_block_with_a_low_bit_cache(tiny_model_dir: Path) -> None:
    """Through the codes of keys and values there is a gradient."""
    _, training, _, arrays, gains = _walked(tiny_model_dir, replace(W4A8, kv_bits=3))
    tuned = tune_block(training, TrainSettings(epochs=3, batch=2), arrays, gains)
    assert tuned.loss_after < tuned.loss_before and tuned.notes == ()


def test_smoothing_sees_the_low_bit_cache(tiny_model_dir: Path) -> None:
    tasks = [block_task(tiny_model_dir, scheme=replace(W4A8, kv_bits=bits)) for bits in (16, 2)]
    scales = [adaptive_scales(task, (QKV, "self_attn.o_proj")) for task in tasks]
    assert any(not torch.equal(scales[0][site], scales[1][site]) for site in scales[0])


@pytest.mark.parametrize("method", ["qqq", "abq", "rtn"])
def test_every_method_takes_it(tiny_model_dir: Path, tmp_path: Path, method: str) -> None:
    more = () if method == "rtn" else ("--effort", "fast")
    assert (
        calibrate_tiny(
            tiny_model_dir, tmp_path / "out", "--method", method, "--kv-bits", "4", *more
        )
        == 0
    )
    quant = read_quant(tmp_path / "out" / "quant")
    assert (quant.scheme.method, quant.scheme.kv_bits, quant.label) == (method, 4, "w4a8-kv4")
