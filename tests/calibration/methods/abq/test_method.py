"""The method's entry points: windows shared by processes in unequal parts, room given back, and two
processes against one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from calibration.__main__ import main
from calibration.blocks.ranks import Ranks
from calibration.blocks.streams import StreamBudget
from calibration.methods.abq.method import METHOD, _train_settings, _train_task
from calibration.methods.abq.settings import AbqSettings
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from tests.calibration.block_cases import block_task
from tests.forks import Started

W2 = QuantScheme("ABQGemm", "abq", 2, 8, True, 16)


def test_every_process_counts_the_windows_alike(tiny_model_dir: Path) -> None:
    from dataclasses import replace

    task = block_task(tiny_model_dir, AbqSettings(train_windows=128, batch=1), W2)
    for windows, world in ((15, 2), (128, 3)):
        made = [
            _train_task(replace(task, ranks=Ranks(rank, world), windows=windows))
            for rank in range(world)
        ]
        assert {len(one.x_q) for one in made} == {windows}
        assert _train_settings(replace(task, ranks=Ranks(0, world)), 1).batch == world


def test_tuning_gives_its_room_back(tiny_model_dir: Path) -> None:
    task = block_task(tiny_model_dir, AbqSettings(), W2)
    budget: StreamBudget = task.streams.budget
    held = budget.held
    result = METHOD.calibrate(task)
    assert budget.held == held and result.report["tune_after"] <= result.report["tune_before"]


def _command(rank: int, *arguments: str) -> int:
    return main([*arguments, "--offline", "--progress", "none"])


def test_two_processes_train_as_one(
    together: Callable[..., list[Started]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Five windows over two processes: the same losses within 1e-4."""
    losses, scales = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        line = (
            f"{tiny_model_dir} --wbits 2b --abits 8 --group-size 16 --nsamples 5 --seqlen 32 "
            f"--set batch=2 --set epochs=1 --out {out}"
        )
        ended = together(_command, *line.split(), world=count)
        assert [code for code, *_ in ended] == [0] * count, ended
        blocks = json.loads((out / "quant" / "quant.json").read_text(encoding="utf-8"))[
            "calibration"
        ]["blocks"]
        losses.append(
            [
                block[key]
                for block in blocks
                for key in ("train_before", "train_after", "tune_before", "tune_after")
            ]
        )
        scales.append(read_quant(out / "quant").linear("model.layers.1.mlp.down_proj").arrays.scale)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(scales[0], scales[1], rtol=1e-2)
