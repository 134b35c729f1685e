"""Several processes that calibrate together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, str, str]]]:
    """together(work, *arguments, world=2) -> exit code, stdout and stderr of work(rank, *arguments)
    in each of so many processes that find each other as those of torchrun.
    """
    import torch

    from tests.forks import Fork

    def run(
        work: Callable[..., Any], *arguments: Any, world: int = 2
    ) -> list[tuple[int, str, str]]:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        environment = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store outlives the processes
        }
        folder = tmp_path_factory.mktemp("ranks")
        forks = [
            Fork(folder, str(rank), environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]
        begun = [fork.start(work, rank, *arguments) for rank, fork in enumerate(forks)]
        try:
            return [fork.end(process) for fork, process in zip(forks, begun, strict=True)]
        except AssertionError as hung:
            said = "\n".join(f"rank {fork.name}: {fork.text('err')}" for fork in forks)
            raise AssertionError(said) from hung
        finally:
            for process in begun:
                process.kill()  # nothing, where it has ended

    return run
