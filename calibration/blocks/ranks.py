"""The processes that share one calibration: each holds a part of the windows, sums are taken over
all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plugins.errors import EXIT_OTHER

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Ranks", "join_ranks"]

_SPOKEN = "error"  # key of the store: how many processes wanted to tell of an error


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them (torchrun), or alone.

    Attributes:
        rank, world: its number, and how many there are.
        store: the key-value store that they share; None alone.
    """

    rank: int = 0
    world: int = 1
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` windows are this process's: every world-th."""
        return range(self.rank, count, self.world)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the processes, in place; all get the same bits."""
        import torch

        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def largest(self, tensor: Tensor) -> None:
        """Elementwise maximum over the processes, in place."""
        import torch

        if self.world > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)

    def wait(self) -> None:
        """Until every process is here."""
        import torch

        if self.world > 1:
            torch.distributed.barrier()

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """An error ends every process, and only the one that meets it first tells of it.

        All meet a wrong input at once, and the end of one ends the others in the middle of a sum.

        Raises:
            SystemExit: another process has told already.
        """
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if self._heard():
                raise SystemExit(getattr(error, "exit_code", EXIT_OTHER)) from None
            raise
        if self.world > 1:
            import torch

            torch.distributed.destroy_process_group()

    def _heard(self) -> bool:
        if self.world == 1:
            return False
        try:
            return bool(self.store.add(_SPOKEN, 1) > 1)
        except RuntimeError:  # the store is gone with the process that kept it
            return True


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The processes that torchrun started, each on a GPU of its own if there are any; or ALONE,
    without importing torch.

    To be called once. Waits for the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % gpus)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=world
    )
    return Ranks(rank, world, store)
