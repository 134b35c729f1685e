"""An export that is killed (SIGKILL) in every stage, one after the other, and gone on with: nothing
that was finished is made again, and the files are those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import calibration.blocks.driver
import calibration.quant.quantize
import exporter.engine.build
import exporter.engine.edition
import plugins.tools.build
from calibration.blocks.saved_streams import SavedStreams
from calibration.blocks.store import BlockStore
from calibration.checkpoints.safetensors import SafetensorsWriter
from calibration.out.files import write_json
from calibration.out.pieces import Pieces
from calibration.progress import PlainProgress
from exporter.__main__ import main
from exporter.engine.edition import Edition
from tests.conftest import FOUR_WINDOWS, W4A8
from tests.exporter.engine_cases import ENGINE

FORKS = get_context("forkserver")  # of a process that has imported everything once
FORKS.set_forkserver_preload([__name__, "exporter.proof.prove", "exporter.graph.decoder"])
STAGES = ("quant", "onnx", "engine", "report")


def die(*arguments: Any, **options: Any) -> Any:
    """As the kernel's out-of-memory killer ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _export(arguments: list[str], log: Path, moment: str) -> None:
    """The exporter with a stand-in for TensorRT, killed at a moment; the log names the blocks that are
    walked with finished codes.
    """
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    library = log.with_name("libanybit_plugins.so")
    library.write_bytes(b"library")
    walk, advance = calibration.blocks.driver.walk, PlainProgress.advance
    save, save_streams = BlockStore.save, SavedStreams.save
    made, write, shards = Pieces.made, SafetensorsWriter.write, calibration.quant.quantize._shards
    steps = dict.fromkeys(STAGES, 0)

    def told_walk(block: Any, *rest: Any, **options: Any) -> Any:
        print(f"walked {block.block.index}")
        return walk(block, *rest, **options)

    def told_made(self: Pieces, name: str, *rest: Any) -> Any:
        if not name.startswith("block"):
            print(f"made {name.split('-of-')[0].removesuffix('.safetensors')}")
        if moment == "report" and name.startswith("users"):
            die()
        return made(self, name, *rest)

    def write_half(self: SafetensorsWriter, *rest: Any) -> None:
        write(self, *rest)
        if moment == "quant" and "model-00002" in self._path.name:
            die()

    def counted(self: PlainProgress, *rest: Any, **options: Any) -> None:
        steps[self._stage] = steps.get(self._stage, 0) + 1
        if self._stage == moment == "onnx" and steps[moment] == 2:
            die()
        advance(self, *rest, **options)

    def build_engine(onnx: Path, library: Path, folder: Path, *rest: Any) -> dict[str, Any]:
        (folder / "model.engine").write_bytes(b"half")
        if moment == "engine":
            die()
        write_json(folder / "engine.json", ENGINE)
        return ENGINE

    def until(name: str, index: int, real: Callable[..., None]) -> Callable[..., None]:
        return lambda self, number, *rest: (
            die() if (moment, index) == (name, number) else real(self, number, *rest)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.blocks.driver, "walk", told_walk)
        patch.setattr(Pieces, "made", told_made)
        patch.setattr(SafetensorsWriter, "write", write_half)
        patch.setattr(calibration.quant.quantize, "_shards", lambda one, _: shards(one, 60_000))
        patch.setattr(PlainProgress, "advance", counted)
        patch.setattr(BlockStore, "save", until("block", 1, save))
        patch.setattr(SavedStreams, "save", until("streams", 2, save_streams))
        patch.setattr(exporter.engine.build, "select_edition", lambda _: Edition("tensorrt", "10"))
        patch.setattr(exporter.engine.build, "build_engine", build_engine)
        patch.setattr(exporter.engine.edition, "gpu_capabilities", list)
        patch.setattr(plugins.tools.build, "build_library", lambda **_: library)
        code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage(
    tiny_llama: Callable[..., Path], tmp_path: Path, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    model = tiny_llama(num_hidden_layers=3)

    def export(out: str, moment: str = "") -> list[str]:
        arguments = [str(model), *W4A8, *FOUR_WINDOWS, "--out", str(tmp_path / out), "--offline"]
        arguments += ["--progress", "plain", "--resume", "--max-seq", "64"]
        log = tmp_path / f"{out}.log"
        process = FORKS.Process(target=_export, args=(arguments, log, moment))
        process.start()
        process.join()
        text = log.read_text()
        assert process.exitcode == (-signal.SIGKILL if moment else 0), text
        told = ("kept", "walked", "of 3: loss", "made")
        return [line.split(",")[0] for line in text.splitlines() if any(map(line.count, told))]

    def blocks(kept: int, walked: str = "") -> list[str]:
        """What the log of a run has to say of the blocks, in order."""
        known = [f"block {index} of 3: kept" for index in range(1, kept + 1)]
        return [*known[:-1], *([walked] if walked else []), *known[-1:]]

    first = export("whole", "report")  # which tells of times and is not compared
    assert not any("kept" in line for line in first)
    files = [line for line in first if "model-" in line]
    levels = ["weights", "bodies", "native", "users", "reference", "float", "loss", "quality"]
    levels = [f"made {name}" for name in levels]
    assert first[3:] == [*files, *levels[:4]] and len(files) > 3
    assert export("out", "block") == first[:1]
    assert export("out", "streams") == blocks(1)
    # The second block was finished, the streams behind it were not: one walk, and the third block.
    again = export("out", "quant")
    assert again == [*blocks(2, "walked 1"), first[2], *files[:2]]
    assert export("out", "onnx") == [*blocks(3), *files[1:]]
    assert export("out", "engine") == ["quant: kept"]
    assert export("out", "report") == ["quant: kept", "onnx: kept", *levels[:4]]
    assert export("out") == ["quant: kept", "onnx: kept", "engine: kept", *levels[3:]]
    for stage in STAGES[:3]:
        assert snapshot(tmp_path / "out" / stage) == snapshot(tmp_path / "whole" / stage)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {*STAGES, ".lock", "manifest.json"}
