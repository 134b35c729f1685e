"""Activation windows: the same values from memory and from files, a bound that holds, and files
that nobody sees.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.blocks.streams import ActivationWindows, StreamBudget, Windows
from calibration.quant.scheme import QuantScheme
from calibration.reference.fake_quant import Activation


def _items(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("limit", [None, 0, 479, 480])
def test_values_come_back_bit_for_bit(tmp_path: Path, limit: int | None) -> None:
    budget = StreamBudget(limit, tmp_path)
    items, windows = _items(), budget.windows(3, (5, 8))
    for index in (2, 0, 1):
        windows[index] = items[index].T.contiguous().T  # not contiguous
    windows[1] = items[1] = items[1] + 1  # written again
    assert len(windows) == 3 and windows.shape == (3, 5, 8)
    assert all(torch.equal(a, b) for a, b in zip(windows, items, strict=True))
    assert torch.equal(windows[1], items[1])
    inside = limit is None or limit >= 480
    assert (budget.held, budget.peak, budget.spilled) == ((480, 480, 0) if inside else (0, 0, 480))
    windows.close()
    windows.close()  # once more changes nothing
    assert budget.held == 0


def test_files_have_no_name_and_lie_in_the_folder(tmp_path: Path) -> None:
    windows = StreamBudget(0, tmp_path).windows(3, (5, 8))
    for index, item in enumerate(_items()):
        windows[index] = item
    opened = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208  (one of them is of the listing itself)
        with suppress(OSError):
            opened.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
    assert list(tmp_path.iterdir()) == []
    assert any(link.startswith(f"{tmp_path}/") and link.endswith(" (deleted)") for link in opened)
    windows.close()


def test_memory_is_given_back_and_taken_again(tmp_path: Path) -> None:
    budget = StreamBudget(1000, tmp_path)
    first, second = budget.windows(3, (5, 8)), budget.windows(3, (5, 8))
    third = budget.windows(3, (5, 8))  # 1440 bytes would be too much
    assert (budget.held, budget.peak, budget.spilled) == (960, 960, 480)
    third.close()
    first.close()
    fourth = budget.windows(3, (5, 8))
    assert (budget.held, budget.peak, budget.spilled) == (960, 960, 480)
    second.close()
    fourth.close()
    assert budget.held == 0


def test_what_is_not_written_yet_is_not_read() -> None:
    windows = StreamBudget().windows(2, (5, 8))
    windows[1] = _items()[0]
    with pytest.raises(AssertionError, match="read before it was written"):
        windows[0]


def test_windows_keep_no_gradient() -> None:
    windows: Windows = StreamBudget().windows(1, (5, 8))
    windows[0] = _items()[0].requires_grad_() * 2
    assert not windows[0].requires_grad


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize(
    ("bits", "symmetric", "width"), [(8, True, 1), (4, False, 1), (16, False, 4)]
)
def test_quantised_inputs_take_a_byte_each(
    tmp_path: Path, limit: int | None, bits: int, symmetric: bool, width: int
) -> None:
    budget = StreamBudget(limit, tmp_path)
    windows = ActivationWindows(
        budget, 3, (5, 8), QuantScheme("ABQGemm", "rtn", 4, bits, act_symmetric=symmetric), "cpu"
    )
    wanted = [Activation.of(item, bits, symmetric) for item in _items()]
    for index, activation in enumerate(wanted):
        windows[index] = activation
    per_token = 4 * (0 if bits == 16 else 1 if symmetric else 2)  # scale, zero
    assert len(windows) == 3 and budget.held + budget.spilled == 3 * 5 * (8 * width + per_token)
    for found, activation in zip(windows, wanted, strict=True):
        assert (
            torch.equal(found.values(), activation.values())
            and found.codes.dtype == activation.codes.dtype
        )
    windows.close()
    assert budget.held == 0
