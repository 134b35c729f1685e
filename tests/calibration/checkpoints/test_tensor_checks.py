"""The finite check on both sides of its block border, and the causes given for missing tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from calibration.checkpoints import tensor_checks
from calibration.checkpoints.tensor_checks import check_finite, match_tensors, same_numbers
from calibration.families import family
from plugins.errors import InputError
from tests.conftest import TINY_CONFIG


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("position", [(0, 0), (2, 3), (2, 4), (9, 6)])
def test_position_is_right_whatever_the_blocks(
    dtype: type, position: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_checks, "_BLOCK", 9)
    array: np.ndarray = np.ones((10, 7), dtype)
    check_finite("here", array)
    array[position] = np.inf
    with pytest.raises(InputError) as caught:
        check_finite("here", array)
    assert str(caught.value) == (
        f"here: got inf at {list(position)}, expected finite numbers. "
        "The weights are damaged: download or train them again."
    )


def test_large_finite_weights_do_not_look_infinite() -> None:
    check_finite("here", np.full(1000, 3e38, np.float32))


@pytest.mark.parametrize("position", [(0, 0), (2, 3), (2, 4), (9, 6)])
def test_one_different_number_shows_whatever_the_blocks(
    position: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_checks, "_BLOCK", 9)
    array: np.ndarray = np.ones((10, 7), np.float32)
    other = array.astype(np.float16)
    assert same_numbers(array, other) and same_numbers(array, array)
    other[position] = 1.001
    assert not same_numbers(array, other)


@pytest.mark.parametrize(
    ("rename", "cause"),
    [
        (
            {"up_proj.weight": "up_proj.qweight"},
            "missing model.layers.0.mlp.up_proj.weight (the weights are quantised). Give the "
            "float model it was made from.",
        ),
        (
            {"up_proj.weight": "up_proj.new"},
            "missing model.layers.0.mlp.up_proj.weight. The download is incomplete or the file "
            "belongs to another model.",
        ),
    ],
)
def test_causes(rename: dict[str, str], cause: str) -> None:
    decoder = family("llama").decoder({**TINY_CONFIG, "num_hidden_layers": 1})
    found = dict(decoder.shapes())
    for old, new in rename.items():
        found[f"model.layers.0.mlp.{new}"] = found.pop(f"model.layers.0.mlp.{old}")
    with pytest.raises(InputError) as caught:
        match_tensors("m", decoder, found)
    assert str(caught.value) == f"m: got 10 of the 11 tensors its config asks for, {cause}"
