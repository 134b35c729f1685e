"""Reading the quant folder back, fused layers, and every kind of damage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibration.families import family_names
from calibration.out.files import sha256_file
from calibration.quant.folder import fuse, read_quant
from calibration.quant.scheme import QuantLinear, QuantScheme
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

AGAIN = "The folder is damaged: quantise the model again."


@pytest.fixture
def folder(tiny_quant: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a quant folder that the test may damage."""
    return shutil.copytree(tiny_quant() / "quant", tmp_path / "quant")


def _refusal(folder: Path, verify: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        read_quant(folder, verify)
    assert caught.value.exit_code == 2
    return str(caught.value)


def _change_meta(folder: Path, **changes: Any) -> None:
    path = folder / "quant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"group_size": 16},
        {"group_size": 32, "has_minimum": True},
        {"op": "QQQGemm"},
        {"op": "QQQGemm", "group_size": 64},
    ],
    ids=str,
)
def test_groups_are_the_linears_stacked(
    tiny_quant: Callable[..., Path], fields: dict[str, Any]
) -> None:
    quant = read_quant(tiny_quant(**fields) / "quant")
    groups = quant.groups(1)
    assert [group.name for group in groups] == [
        f"model.layers.1.{node}"
        for node in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    parts = [quant.linear(f"model.layers.1.self_attn.{name}_proj") for name in "qkv"]
    np.testing.assert_array_equal(
        groups[0].dequantize(), np.concatenate([part.dequantize() for part in parts])
    )
    attributes = groups[0].attributes
    assert (attributes.out_features, attributes.in_features, attributes.group_size) == (
        128,
        64,
        fields.get("group_size", 0),
    )
    assert (quant.layers, quant.scheme.op) == (2, fields.get("op", "ABQGemm"))
    minimum = fields.get("has_minimum", False)
    assert quant.has("model.layers.0.mlp.down_proj.minimum") is quant.scheme.has_minimum is minimum
    stored = json.loads((quant.path / "quant.json").read_text())["scheme"]
    assert stored.get("has_minimum", "absent") == (True if minimum else "absent")


def test_fuse_gives_zeros_to_parts_without_a_bias() -> None:
    scheme = QuantScheme("ABQGemm", "rtn", 4, 8)

    def part(rows: int, bias: np.ndarray | None) -> QuantLinear:
        return QuantLinear(
            "x",
            scheme,
            QuantArrays(
                np.full((rows, 8), rows, np.uint8),
                np.ones((rows, 1), np.float32),
                np.zeros((rows, 1), np.int32),
                None,
                bias,
            ),
        )

    fused = fuse([part(2, None), part(3, np.ones(3, np.float32))], "both")
    assert fused.name == "both" and fused.arrays.bias is not None
    np.testing.assert_array_equal(fused.arrays.bias, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(fused.arrays.codes[:, 0], [2, 2, 3, 3, 3])
    assert (
        fused.arrays.scale_group is None
        and fuse([part(2, None), part(2, None)], "n").arrays.bias is None
    )


def test_tokenizer_comes_with_the_folder(tiny_quant: Callable[..., Path]) -> None:
    tokenizer = read_quant(tiny_quant() / "quant").tokenizer()
    text = "Bread is flour, water, salt and time."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_reading_imports_no_torch(tiny_quant: Callable[..., Path]) -> None:
    program = (
        "import sys; from calibration.quant.folder import read_quant; "
        f"q = read_quant({str(tiny_quant() / 'quant')!r}); q.groups(0)[0].dequantize(); "
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_one_changed_byte_is_found(folder: Path) -> None:
    path = folder / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    message = _refusal(folder)
    wanted = json.loads((folder / "quant.json").read_text())["files"][path.name]
    assert message.startswith(f"{path}: got SHA-256 ") and message.endswith(
        f", expected {wanted[:12]}... from quant.json. {AGAIN}"
    )
    assert read_quant(folder, verify=False).layers == 2


def test_changed_tokenizer_is_found(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert _refusal(folder).startswith(f"{path}: got SHA-256 ")


def test_truncated_weights_are_found_without_reading_them(folder: Path) -> None:
    path = folder / "model-00001-of-00001.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    assert _refusal(folder, verify=False) == (
        f"{path}: got {size - 8} bytes, expected {size} from its header. "
        "The file is truncated or damaged: download or make it again."
    )


def test_missing_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert (
        _refusal(folder) == f"{folder}: got no tokenizer.json, expected it from quant.json. {AGAIN}"
    )


def test_missing_and_corrupt_quant_json(folder: Path) -> None:
    path = folder / "quant.json"
    path.write_text(path.read_text()[:-20])
    message = _refusal(folder)
    assert message.startswith(f"{path}: got unreadable JSON (") and message.endswith(
        f"), expected a whole file. {AGAIN}"
    )
    path.unlink()
    assert _refusal(folder) == (f"{path}: got no such file, expected a JSON file. {AGAIN}")


@pytest.mark.parametrize("value", [2, None, "1"])
def test_other_format(folder: Path, value: object) -> None:
    _change_meta(folder, format=value)
    assert _refusal(folder) == (
        f"{folder / 'quant.json'}: got format {json.dumps(value)}, expected 1. "
        "Quantise the model again with this version."
    )


@pytest.mark.parametrize("key", ["family", "source", "config", "files", "sizes"])
def test_field_of_another_type(folder: Path, key: str) -> None:
    _change_meta(folder, **{key: 3})
    wanted = "a string" if key == "family" else "an object"
    assert _refusal(folder) == f"{folder / 'quant.json'}, {key}: got 3, expected {wanted}. {AGAIN}"


def test_factors_of_other_frequencies(folder: Path) -> None:
    path = folder / "quant.json"
    config = json.loads(path.read_text())["config"]
    _change_meta(folder, config=config | {"rope_attention_scaling": {"rope.long.inv_freq": 1.0}})
    assert _refusal(folder) == (
        f"{path}, config, rope_attention_scaling: got rope.long.inv_freq, expected rope.inv_freq. "
        f"{AGAIN}"
    )


def test_scheme_with_unknown_fields_and_unknown_family(folder: Path) -> None:
    path = folder / "quant.json"
    scheme = json.loads(path.read_text())["scheme"]
    for change, message in (
        (3, f"{path}, scheme: got 3, expected an object. {AGAIN}"),
        ({"wbits": 4}, f"{path}, scheme: got no op, expected a whole record. {AGAIN}"),
        (
            {**scheme, "bits": 4},
            f"{path}, scheme: got a scheme with bits, expected no such field. {AGAIN}",
        ),
        (
            {**scheme, "wbits": "4"},
            f'{path}, scheme, wbits: got "4", expected a whole number. {AGAIN}',
        ),
        (
            {**scheme, "abits": 1},
            f"{path}, scheme: got 1, expected 2 to 8, or 16 for weight-only. Give one of these.",
        ),
        (
            {**scheme, "dtype": "float8"},
            f'{path}, scheme, dtype: got "float8", expected one of the values it may have. {AGAIN}',
        ),
    ):
        _change_meta(folder, scheme=change)
        assert _refusal(folder) == message
    _change_meta(folder, scheme=scheme)
    _change_meta(folder, family="gpt")
    assert _refusal(folder) == (
        f"model family 'gpt': unknown, expected one of {', '.join(family_names())}. "
        "Make the quantised folder again with this version."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, 'config.hidden_size: got "64", expected a whole number. ' + AGAIN),
        (
            {"eos_token_id": [1, None]},
            "config.eos_token_id[1]: got null, expected a whole number. " + AGAIN,
        ),
        ({"hf": []}, "config.hf: got a list of 0, expected an object. " + AGAIN),
        (
            {"num_hidden_layers": 1 << 30},
            "config: got 1073741824 decoder layers, 2 in hf, and {tensors} tensors, expected "
            "numbers that belong together. " + AGAIN,
        ),
    ],
)
def test_config_of_wrong_values(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "quant.json"
    config = json.loads(path.read_text())["config"]
    tensors = len(read_quant(folder)._entries)
    _change_meta(folder, config=config | change)
    assert _refusal(folder) == f"{path}, {message.format(tensors=tensors)}"


def test_tensors_are_those_of_the_config(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = "model.layers.0.mlp.down_proj.scale"
    _save(folder, {key + "s" if key == name else key: array for key, array in tensors.items()})
    assert (
        _refusal(folder) == f"{folder}: got no tensor {name}, expected it from the config. {AGAIN}"
    )
    _save(folder, {**tensors, "more": tensors[name]})
    assert (
        _refusal(folder)
        == f"{folder}: got a tensor more, expected no such from the config. {AGAIN}"
    )
    rows = list(tensors[name].shape)
    for array, got in (
        (tensors[name].astype(np.float64), f"F64 {rows}"),
        (tensors[name][1:], f"F32 {[rows[0] - 1, rows[1]]}"),
    ):
        _save(folder, {**tensors, name: array})
        assert (
            _refusal(folder) == f"{shard}, tensor {name}: got {got}, expected F32 {rows}. {AGAIN}"
        )


def _save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Other tensors, with a checksum that fits."""
    shard = next(folder.glob("*.safetensors"))
    save_file(tensors, shard)
    _change_meta(
        folder,
        files=json.loads((folder / "quant.json").read_text())["files"]
        | {shard.name: sha256_file(shard)},
    )


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_quant(folder).tensor("model.layers.9.mlp.down_proj.codes")
    assert str(caught.value) == (
        f"{folder}: got no tensor model.layers.9.mlp.down_proj.codes, expected it from the config. "
        f"{AGAIN}"
    )
