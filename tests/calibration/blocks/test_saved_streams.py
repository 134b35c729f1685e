"""Residual streams that a calibration goes on from: the bits that were saved, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calibration.blocks.ranks import ALONE, Ranks
from calibration.blocks.saved_streams import SavedStreams
from calibration.blocks.streams import StreamBudget, Windows
from calibration.out.pieces import Pieces


def _windows(values: torch.Tensor | None, limit: int | None = None) -> Windows:
    windows = StreamBudget(limit).windows(3, (4, 5))
    if values is not None:
        for index, value in enumerate(values):
            windows[index] = value
    return windows


def _saved(
    folder: Path,
    fingerprint: str = "print",
    ranks: Ranks = ALONE,
    told: Callable[[str], None] = pytest.fail,
) -> SavedStreams:
    return SavedStreams(Pieces(folder, fingerprint, writes=False), ranks, told)


@pytest.fixture
def values() -> torch.Tensor:
    """Of two streams of three windows."""
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def work(tmp_path: Path, values: torch.Tensor) -> Path:
    """Streams behind the second block, which were kept in memory and in a file."""
    saved = _saved(tmp_path)
    saved.save(1, [_windows(values[1]), _windows(values[0])])
    saved.save(2, [_windows(values[0]), _windows(values[1], limit=0)])
    return tmp_path


def test_they_come_back_as_they_were(work: Path, values: torch.Tensor) -> None:
    assert [path.name for path in work.iterdir()] == ["streams-00002-0-of-1.bin"]
    saved, streams = _saved(work), [_windows(None, limit=0), _windows(None)]
    assert [saved.behind(most) for most in range(4)] == [0, 0, 2, 2]
    saved.load(2, streams)
    assert torch.equal(torch.stack([torch.stack(list(one)) for one in streams]), values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:10],
        lambda data: b"",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
)
def test_damaged_ones_count_as_missing(work: Path, damage: Callable[[bytes], bytes]) -> None:
    path = work / "streams-00002-0-of-1.bin"
    path.write_bytes(damage(path.read_bytes()))
    assert _saved(work).behind(2) == 0


def test_those_of_another_run_count_as_missing(work: Path) -> None:
    assert _saved(work, "another").behind(2) == 0


def test_those_of_another_number_of_processes_are_removed(work: Path, values: torch.Tensor) -> None:
    other = _saved(work, ranks=Ranks(rank=1, world=2))
    assert not list(work.iterdir())
    other.save(1, [_windows(values[0])])
    assert [path.name for path in work.iterdir()] == ["streams-00001-1-of-2.bin"]
    _saved(work, ranks=Ranks(rank=0, world=2))  # another process's of the same run stay
    assert list(work.iterdir())
    assert _saved(work).behind(1) == 0 and not list(work.iterdir())


def test_a_disk_that_takes_none_is_told_of_once(
    work: Path, values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    saved, before = _saved(work, told=told.append), (work / "streams-00002-0-of-1.bin").read_bytes()

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        saved.save(3, [_windows(values[0])])
    saved.save(4, [_windows(values[0])])
    assert told == [
        f"{work / 'streams-00003-0-of-1.bin'}: got No space left on device while writing. The "
        "calibration goes on; should it be interrupted, --resume walks finished blocks again, which "
        "takes longer."
    ]
    assert {path.name: path.read_bytes() for path in work.iterdir()} == {
        "streams-00002-0-of-1.bin": before
    }
