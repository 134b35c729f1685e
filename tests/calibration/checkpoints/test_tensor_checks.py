"""The finite check on both sides of its block border, and the causes given for missing tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from calibration.checkpoints import tensor_checks
from calibration.checkpoints.tensor_checks import check_finite, match_tensors
from plugins.errors import InputError


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
