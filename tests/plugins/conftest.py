"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.plugins.kernel_runner import KernelRunner, cuda_missing


@pytest.fixture(scope="module", params=["sim", "cuda"])
def runner(request: pytest.FixtureRequest) -> Iterator[KernelRunner]:
    """The kernels in the simulation and, where there is one, on a GPU; a test may choose the
    simulated GPU.
    """
    if request.param == "cuda" and (reason := cuda_missing()):
        pytest.skip(reason)
    runner = KernelRunner(request.param)
    yield runner
    runner.set_device(90, 4)
