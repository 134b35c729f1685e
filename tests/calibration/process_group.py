"""A process of a group as torchrun starts it, and what became of all of them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.forks import FORKS

__all__ = ["PATIENCE", "Ended", "together"]

PATIENCE = 300  # seconds, on a machine that is busy
Ended = list[tuple[int, str, str]]  # exit code, stdout, stderr of every process


def _child(
    work: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # the store outlives the processes
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    try:
        code = work(rank, *arguments) or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together(folder: Path, work: Callable[..., Any], *arguments: Any, world: int = 2) -> Ended:
    """work(rank, *arguments) in so many processes that find each other, their output in files of the
    folder.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    children = [
        FORKS.Process(target=_child, args=(work, rank, world, store.port, folder, arguments))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
    hung = [child for child in children if child.exitcode is None]
    for child in hung:
        child.kill()
    assert not hung, [(folder / f"err{rank}").read_text() for rank in range(world)]
    return [
        (
            child.exitcode or 0,
            (folder / f"out{rank}").read_text(),
            (folder / f"err{rank}").read_text(),
        )
        for rank, child in enumerate(children)
    ]
