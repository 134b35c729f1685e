"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.plugins.kernel_runner import (
    CPU_KINDS,
    KernelRunner,
    cpu_missing,
    cuda_missing,
)


def _runner(kind: str) -> Iterator[KernelRunner]:
    kind_of_chip, _, isa = kind.partition("-")
    emulated = kind_of_chip == "emulated"
    reason = cuda_missing() if kind_of_chip == "cuda" else cpu_missing(isa, emulated) if isa else ""
    if reason:
        pytest.skip(reason)
    runner = KernelRunner(kind)
    yield runner
    runner.set_device(90, 4)


@pytest.fixture(scope="module", params=["sim", "cuda", *CPU_KINDS])
def runner(request: pytest.FixtureRequest) -> Iterator[KernelRunner]:
    """The kernels in the simulation, natively on this CPU with each of its instruction sets and,
    where there is one, on a GPU; a test may choose the simulated GPU.
    """
    yield from _runner(request.param)


@pytest.fixture(scope="module", params=["sim", "cuda"])
def gpu_runner(request: pytest.FixtureRequest) -> Iterator[KernelRunner]:
    """The CUDA kernels, in the simulation and on a GPU."""
    yield from _runner(request.param)
