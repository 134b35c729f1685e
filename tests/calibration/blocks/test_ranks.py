"""Several processes: the numbers of one, one that writes, one that speaks, and an end for all when
one fails.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.__main__ import main
from calibration.blocks.ranks import ALONE, Ranks, join_ranks
from calibration.checkpoints.safetensors import SafetensorsWriter
from calibration.out.files import locked
from calibration.out.layout import WORK
from plugins.errors import EXIT_INTERRUPT, InputError
from tests.calibration.block_cases import calibrate_tiny, files
from tests.conftest import W4A8
from tests.forks import PATIENCE, Started

Ended = list[Started]


def _command(rank: int, *arguments: str) -> int:
    return main([*arguments, "--offline"])


def _tiny(model: Path, out: Path, *more: str) -> tuple[str, ...]:
    return (
        str(model),
        *W4A8,
        "--nsamples",
        "5",
        "--seqlen",
        "32",
        "--out",
        str(out),
        *more,
    )


# ---------------------------------------------------------------- sums and shares


def _sums(rank: int) -> None:
    ranks = join_ranks()
    assert (ranks.rank, ranks.world, ranks.first) == (rank, 3, rank == 0)
    assert list(ranks.share(7)) == list(range(rank, 7, 3))
    sums, most = (
        [torch.full((2,), rank + 1.0), torch.tensor(rank, dtype=torch.float64)],
        torch.tensor([rank, -rank]),
    )
    ranks.sum(sums)
    ranks.largest(most)
    ranks.wait()
    with ranks.one_voice():
        pass  # leaves the group
    assert sums[0].tolist() == [6, 6] and sums[1] == 3 and most.tolist() == [2, 0]
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_three_processes(together: Callable[..., Ended]) -> None:
    assert [code for code, *_ in together(_sums, world=3)] == [0, 0, 0]


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world:
            monkeypatch.setenv("WORLD_SIZE", world)
        assert join_ranks() is ALONE
    x = torch.tensor([1.0, -2.0])
    ALONE.sum([x])
    ALONE.largest(x)
    ALONE.wait()
    assert x.tolist() == [1, -2] and list(ALONE.share(3)) == [0, 1, 2] and ALONE.first
    error = InputError("here", "got this", "do that")
    with pytest.raises(InputError) as caught, ALONE.one_voice():
        raise error
    assert caught.value is error


def test_an_argparse_exit_is_left_alone() -> None:
    with pytest.raises(SystemExit) as stop, Ranks(1, 2).one_voice():
        raise SystemExit(2)
    assert stop.value.code == 2


# ---------------------------------------------------------------- a whole calibration

DICE = """
import torch
def round(target, hessian, grid):
    dice = torch.rand(target.shape, generator=grid.generator) < 0.5
    return torch.where(dice, grid.round(target), grid.ends[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, ()),
        (3, ("--set", "smooth=all", "--set", "rotation=none", "--group-size", "64")),
        (2, ("--method", "FILE")),
    ],
    ids=["two", "three, smoothed", "two, at random"],
)
def test_as_many_processes_as_one(
    together: Callable[..., Ended],
    tiny_model_dir: Path,
    tmp_path: Path,
    world: int,
    more: tuple[str, ...],
) -> None:
    """Five windows do not divide among them; rank 0 alone writes and talks."""
    file = tmp_path / "dice.py"
    file.write_text(DICE)
    more = tuple(word.replace("FILE", str(file)) for word in more)
    ended = together(_command, *_tiny(tiny_model_dir, tmp_path / "many", *more), world=world)
    assert [code for code, *_ in ended] == [0] * world, ended
    assert ended[0][2].splitlines()[-1].startswith(f"{tmp_path / 'many' / 'quant'}: ")
    assert all((out, err) == ("", "") for _, out, err in ended[1:])
    assert (
        main([*_tiny(tiny_model_dir, tmp_path / "one", *more), "--offline", "--progress", "none"])
        == 0
    )
    name = "model-00001-of-00001.safetensors"
    many, one = (load_file(tmp_path / folder / "quant" / name) for folder in ("many", "one"))
    assert many.keys() == one.keys() and all(torch.equal(many[key], one[key]) for key in one)
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [".lock", "quant"]


@pytest.mark.slow
def test_torchrun(run_module: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("--standalone", "--nproc-per-node", "2", "-m", "calibration")
    done = run_module(
        "torch.distributed.run",
        *arguments,
        *_tiny(tiny_model_dir, tmp_path / "two"),
        "--offline",
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("block 1 of 2") == 1
    assert main([*_tiny(tiny_model_dir, tmp_path / "one"), "--offline", "--progress", "none"]) == 0
    assert files(tmp_path / "two" / "quant") == files(tmp_path / "one" / "quant")
    wrong = _tiny(tiny_model_dir, tmp_path / "two", "--set", "damp=much")
    done = run_module("torch.distributed.run", *arguments, *wrong, timeout=2 * PATIENCE)
    assert done.returncode != 0
    assert done.stderr.count("--set damp=much: got 'much', expected a number of at least 0.") == 1


def _die_at_the_second_block(rank: int, *arguments: str) -> int:
    from calibration.blocks.store import BlockStore

    real = BlockStore.save

    def save(self: BlockStore, index: int, result: Any) -> None:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, index, result)

    BlockStore.save = save  # type: ignore[method-assign]
    return _command(rank, *arguments)


def test_a_killed_group_goes_on(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The first process is killed; the other one ends too; another number of processes goes on from
    the block that is there.
    """
    arguments = _tiny(tiny_model_dir, tmp_path / "many")
    ended = together(_die_at_the_second_block, *arguments)
    assert ended[0][0] == -signal.SIGKILL and ended[1][0] != 0
    ended = together(_command, *arguments, "--resume", world=3)
    assert [code for code, *_ in ended] == [0, 0, 0], ended
    assert "block 1 of 2: kept" in ended[0][2] and "block 2 of 2: kept" not in ended[0][2]
    assert main([*_tiny(tiny_model_dir, tmp_path / "one"), "--offline", "--progress", "none"]) == 0
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "many" / "quant" / name).read_bytes() == (
        tmp_path / "one" / "quant" / name
    ).read_bytes()


def _late_for_the_blocks(rank: int, out: str, *arguments: str) -> int:
    from calibration.blocks.store import BlockStore

    real = BlockStore.digests

    def digests(self: BlockStore) -> list[str]:
        until = time.monotonic() + 2
        while rank and time.monotonic() < until and Path(out, WORK).exists():
            time.sleep(0.01)
        return real(self)

    BlockStore.digests = digests  # type: ignore[method-assign]
    return _command(rank, *arguments)


def test_nobody_is_late_for_blocks_that_are_all_there(
    together: Callable[..., Ended],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = _tiny(tiny_model_dir, tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "__enter__", die)
        assert main([*arguments, "--offline", "--progress", "none"]) == EXIT_INTERRUPT
    ended = together(_late_for_the_blocks, str(tmp_path), *arguments, "--resume")
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "block 2 of 2: kept" in ended[0][2] and not (tmp_path / WORK).exists()


def test_a_method_without_data_is_written_once(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    ended = together(_command, *_tiny(tiny_model_dir, tmp_path / "out", "--method", "rtn"))
    assert [code for code, *_ in ended] == [0, 0] and ended[1][2] == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "quant"]


# ---------------------------------------------------------------- one voice


def _said(ended: Ended) -> str:
    """What the processes said on stderr, all of which failed."""
    assert all(code != 0 for code, *_ in ended), ended
    return "".join(err for *_, err in ended)


def test_a_wrong_input_is_told_once(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    ended = together(_command, *_tiny(tiny_model_dir, tmp_path / "out", "--set", "damp=much"))
    assert [code for code, *_ in ended] == [2, 2]
    assert (
        _said(ended).startswith("--set damp=much: got 'much', expected a number of at least 0.")
        and _said(ended).count("\n") == 1
    )


def test_an_unknown_option_is_told_once(together: Callable[..., Ended], tmp_path: Path) -> None:
    ended = together(_command, "llama-7b", "--wbits", "4", "--abits", "8", "--colour", "red")
    assert [code for code, *_ in ended] == [2, 2]
    assert _said(ended).count("unrecognized arguments: --colour red") == 1 and ended[1][2] == ""


def test_a_folder_of_other_settings_is_told_once(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    arguments = _tiny(tiny_model_dir, tmp_path, "--method", "rtn", "--dtype")
    assert main([*arguments, "float16", "--offline", "--progress", "none"]) == 0
    ended = together(_command, *arguments, "float32")
    assert ended[0][0] == 2 and "".join(err for *_, err in ended) == (
        f"{tmp_path / 'quant'}: got a model quantised with dtype float16, expected dtype float32. "
        "Choose another --out, or delete this folder.\n"
    )


def test_nan_that_all_meet_at_once_is_told_once(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = _said(together(_command, *_tiny(model, tmp_path / "out", "--progress", "none")))
    assert said == (
        f"{model}, tensor model.layers.1.mlp.up_proj.weight: got nan at [0, 0], expected finite numbers. "
        "The weights are damaged: download or train them again.\n"
    )


def test_what_the_first_one_alone_meets_ends_all(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    with locked(tmp_path):
        said = _said(together(_command, *_tiny(tiny_model_dir, tmp_path)))
    assert said == (
        f"{tmp_path}: got a folder that another process is writing, expected a free one. "
        "Wait for it to end or choose another --out.\n"
    )


def test_a_store_that_is_gone_has_heard(capsys: pytest.CaptureFixture[str]) -> None:
    """It lies with the first process where nobody but the processes keeps it."""

    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise torch.distributed.DistNetworkError("connection reset")

    with pytest.raises(SystemExit) as stop, Ranks(1, 2, Gone()).one_voice():
        raise InputError("here", "got this", "do that")
    assert stop.value.code == 2 and capsys.readouterr() == ("", "")


def _second_fails(rank: int, *arguments: str) -> int:
    from calibration.blocks.streams import Windows

    def refuse(self: Windows, index: int, value: torch.Tensor) -> None:
        raise InputError("the second process", "got no room, expected some", "Make room")

    if rank == 1:
        Windows.__setitem__ = refuse  # type: ignore[method-assign]
    return _command(rank, *arguments)


def test_what_another_one_alone_meets_ends_all(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    said = _said(together(_second_fails, *_tiny(tiny_model_dir, tmp_path / "out")))
    assert said == "the second process: got no room, expected some. Make room.\n"
    assert not (tmp_path / "out" / "quant").exists()


def test_fewer_windows_than_processes(
    together: Callable[..., Ended], tiny_model_dir: Path, tmp_path: Path
) -> None:
    said = _said(together(_command, *_tiny(tiny_model_dir, tmp_path / "out", "--nsamples", "1")))
    assert said == (
        "--nsamples: got 1 calibration windows for 2 processes, expected one each or more. "
        "Give more windows or a longer text, or start fewer processes.\n"
    )
    assert calibrate_tiny(tiny_model_dir, tmp_path / "out", "--nsamples", "1") == 0
