"""The head in the quant folder: codes of its own beside the embedding, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods.rtn import quantize
from calibration.quant.bits import SchemeMap, check_head_bits, head_scheme
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from plugins.errors import InputError
from tests.calibration.block_cases import calibrate_tiny

BASE = QuantScheme("QQQGemm", "rtn", 4, 8, group_size=64, act_symmetric=True)
TINY: dict[str, Any] = {"op": "QQQGemm", "act_symmetric": True}


def test_its_scheme_over_a_base() -> None:
    assert head_scheme(16, BASE) is None
    for bits, label, op in ((8, "w8a8", "ABQGemm"), (5, "w5a8-g64", "ABQGemm")):
        head = head_scheme(bits, BASE)
        assert head is not None and (head.label, head.op, head.method) == (label, op, "rtn")
        assert head.act_symmetric and head.dtype == "float16"
    few = head_scheme(4, QuantScheme("ABQGemm", "abq", 1, 4, balanced=True))
    assert few is not None and few.label == "w4a8" and not few.balanced
    floats = head_scheme(8, QuantScheme("ABQGemm", "abq", 3, 16))
    assert floats is not None and floats.label == "w8a16"


@pytest.mark.parametrize("bits", ["3", "9", "7.5", "most", ""])
def test_other_bits(bits: str) -> None:
    with pytest.raises(InputError) as caught:
        check_head_bits(bits)
    assert str(caught.value) == (
        f"--head-bits: got {bits!r}, expected auto, 4 to 8, or 16 for a head in floating point. "
        f"Give one of these."
    )


def test_a_map_with_a_head_as_json() -> None:
    schemes = SchemeMap(BASE, (), 8, 0.001)
    assert SchemeMap.from_dict(json.loads(json.dumps(schemes.as_dict()))) == schemes


def test_codes_beside_a_tied_embedding(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path
) -> None:
    quant, plain = (read_quant(tiny_quant(head=bits, **TINY) / "quant") for bits in (8, 16))
    assert quant.head is not None and plain.head is None
    assert quant.label == plain.label == "w4a8" and not quant.exceptions
    table = open_checkpoint(str(tiny_model_dir), True).array("model.embed_tokens.weight")
    found, want = quant.linear("lm_head"), quantize(table, None, quant.head)
    np.testing.assert_array_equal(found.arrays.codes, want.codes)
    np.testing.assert_array_equal(found.arrays.scale, want.scale)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(quant.tensor(name), plain.tensor(name))
    assert quant.decoder.nodes == (*plain.decoder.nodes, "lm_head")
    assert quant.schemes == (quant.scheme, quant.head)
    assert quant.weights()[quant.head] == 512 * 64
    more = quant.sizes["linear_quant_bits"] - plain.sizes["linear_quant_bits"]
    assert more == 512 * (64 * 8 + 32 + 32)  # codes, scales and zero points
    assert quant.sizes["rest_bytes"] == plain.sizes["rest_bytes"]  # the embedding's table stays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_bits": 4}, "head: got kv_bits 4, expected the model's 16"),
        ({"wbits": 9}, None),
        ({"group_size": 24}, None),
    ],
)
def test_a_damaged_record(
    tiny_quant: Callable[..., Path], tmp_path: Path, changes: dict[str, int], message: str | None
) -> None:
    folder = Path(shutil.copytree(tiny_quant(head=8, **TINY) / "quant", tmp_path / "quant"))
    meta = json.loads((folder / "quant.json").read_text())
    meta["head"] |= changes
    (folder / "quant.json").write_text(json.dumps(meta))
    with pytest.raises(InputError) as caught:
        read_quant(folder, verify=False)
    if message:
        assert str(caught.value) == (
            f"{folder}/quant.json, {message}. The folder is damaged: quantise the model again."
        )


def test_a_head_without_its_record(tiny_quant: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_quant(head=8, **TINY) / "quant", tmp_path / "quant"))
    meta = json.loads((folder / "quant.json").read_text())
    del meta["head"]
    (folder / "quant.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="lm_head"):
        read_quant(folder, verify=False)


def test_formats_of_others_have_float_heads(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--format", "compressed-tensors", "--method", "rtn")
    assert calibrate_tiny(tiny_model_dir, tmp_path / "auto", *more) == 0
    assert read_quant(tmp_path / "auto" / "quant").head is None
    capsys.readouterr()
    assert calibrate_tiny(tiny_model_dir, tmp_path / "8", *more, "--head-bits", "8") == 2
    assert capsys.readouterr().err == (
        "--head-bits: got 8 with --format compressed-tensors, expected 16: other tools "
        "read the head as floats. Add --head-bits 16, or leave out --format compressed-tensors.\n"
    )


def test_a_folder_with_another_head_is_not_replaced(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But with the choice left to calibration either is the same setting."""
    more = ("--method", "rtn")
    assert calibrate_tiny(tiny_model_dir, tmp_path, *more, "--head-bits", "8") == 0
    capsys.readouterr()
    for bits, expected in (("16", "a float table"), ("6", "wbits 6")):
        assert calibrate_tiny(tiny_model_dir, tmp_path, *more, "--head-bits", bits) == 2
        assert capsys.readouterr().err == (
            f"{tmp_path}/quant: got a model with wbits 8 for its head, expected {expected}. "
            f"Choose another --out, or delete this folder.\n"
        )
    assert calibrate_tiny(tiny_model_dir, tmp_path, *more) == 0
    assert read_quant(tmp_path / "quant").head is None  # nothing was measured
