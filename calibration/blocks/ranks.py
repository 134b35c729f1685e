"""The processes that share one calibration: each holds a part of the windows, sums are taken over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALONE", "Ranks", "join_ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them (torchrun), or alone."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` windows are this process's: every world-th."""
        return range(self.rank, count, self.world)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the processes, in place; all get the same bits."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def largest(self, tensor: Tensor) -> None:
        """Elementwise maximum over the processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The processes that torchrun started, or ALONE."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(torch.distributed.get_rank(), world)
