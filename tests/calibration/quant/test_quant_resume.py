"""A quant folder that is gone on with, weight file by weight file: the bytes of a run that nothing
interrupted, and nothing of another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.safetensors import SafetensorsWriter
from calibration.out.layout import WORK
from calibration.out.pieces import Pieces
from calibration.quant.quantize import QuantizeOptions, kept_bytes, quantize_model
from calibration.quant.scheme import QuantScheme
from tests.calibration.block_cases import files

W4A8 = QuantScheme("ABQGemm", "rtn", 4, 8)
SHARD = 30_000  # bytes
Quantize = Callable[..., list[str]]


@pytest.fixture
def quantize(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Goes on in tmp_path/work and writes a folder there; which weight files it makes. At the one with
    number `stop` it is interrupted.
    """

    def run(
        folder: str,
        scheme: QuantScheme = W4A8,
        stop: int = 0,
        size: int = SHARD,
        resume: bool = True,
    ) -> list[str]:
        made: list[str] = []
        start = SafetensorsWriter.__enter__

        def counted(self: SafetensorsWriter) -> SafetensorsWriter:
            made.append(self._path.name.split(".")[1])
            if len(made) == stop:
                self._path.write_bytes(b"half")
                raise KeyboardInterrupt
            return start(self)

        options = QuantizeOptions(work=tmp_path / "work", resume=resume, shard_bytes=size)
        (tmp_path / folder).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsWriter, "__enter__", counted)
            checkpoint = open_checkpoint(str(tiny_model_dir), True)
            try:
                quantize_model(checkpoint, scheme, options, tmp_path / folder)
            except KeyboardInterrupt:
                assert stop
        return made

    return run


def _names(first: int, count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}" for number in range(first, count + 1)]


def test_it_goes_on_at_the_file_that_was_at_work(quantize: Quantize, tmp_path: Path) -> None:
    count = len(quantize("whole"))
    assert count > 4
    assert quantize("started", resume=False, stop=3) == _names(1, count)[:3]
    assert quantize("again", stop=2) == _names(3, count)[:2]
    assert quantize("out") == _names(4, count)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert quantize("once more") == []  # killed before the folder was in its place
    assert files(tmp_path / "once more") == files(tmp_path / "whole")
    # What is gone on with shares no file with a finished folder that would be written into.
    assert len(quantize("other", replace(W4A8, wbits=3))) == count
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\x77"])
def test_a_damaged_file_is_made_again(
    quantize: Quantize, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    quantize("started", stop=4)
    [path] = (tmp_path / "work").glob("model-00002-*")
    path.write_bytes(damage(path.read_bytes()))
    assert [name[:11] for name in quantize("out")][:2] == ["model-00002", "model-00004"]
    quantize("fresh", resume=False)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["scheme", "size", "code", "no resume"])
def test_nothing_is_taken_of_another_run(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    quantize("started", stop=4)
    scheme, size = W4A8, SHARD
    if change == "scheme":
        scheme = replace(scheme, wbits=3)
    elif change == "size":
        size *= 2
    elif change == "code":
        monkeypatch.setattr("calibration.quant.source.code_digest", lambda *_: "another")
    made = quantize("out", scheme, size=size, resume=change != "no resume")
    assert made == _names(1, len(made))
    quantize("fresh", scheme, size=size, resume=False)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_what_is_there_counts_as_room_once(quantize: Quantize, tmp_path: Path) -> None:
    """Weight files and blocks do; streams are no part of the estimate."""
    quantize("whole")
    assert kept_bytes(tmp_path / "nowhere") == 0
    work, size = tmp_path / WORK, sum(map(len, files(tmp_path / "whole").values()))
    (tmp_path / "work").rename(work)
    (work / "streams-00001-0-of-1.bin").write_bytes(bytes(1000))
    [first, *_, last] = sorted(work.glob("*.safetensors"))
    kept = kept_bytes(tmp_path)
    assert kept == sum(path.stat().st_size for path in work.glob("model-*")) <= size
    (tmp_path / "whole").rename(tmp_path / "quant")
    assert kept_bytes(tmp_path) == 0  # a finished folder has them all
    (tmp_path / "quant" / last.name).unlink()
    assert kept_bytes(tmp_path) == last.stat().st_size
    (tmp_path / "quant").rename(tmp_path / "quant.partial")  # goes when the work begins
    assert kept_bytes(tmp_path) == kept and first.stat().st_nlink == 2


def test_a_file_that_can_have_no_second_name_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    pieces, folder = Pieces(tmp_path / "work", "print"), tmp_path / "folder"
    folder.mkdir()
    with pieces.made("a", "b") as path:
        path.write_text("text")
    assert pieces.whole("a", "b") == pieces.recorded("a") and not pieces.whole("a", "c")
    pieces.give("a", folder)
    assert (folder / "a").read_text() == "text" and not pieces.whole("a", "b")
