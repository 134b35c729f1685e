"""The token kernels against numpy: every order bit for bit, on the CPU simulation and, where there is one, on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.plugins.kernel_cases import F16, tokens
from tests.plugins.kernel_runner import KernelRunner, cuda_missing
from tests.plugins.prepare_runner import FLOATS, NATURAL, PLANES, SLOTS, Case, check

ORDERS = pytest.mark.parametrize("kind", [NATURAL, SLOTS, PLANES, FLOATS], ids=["natural", "slots", "planes", "floats"])


@pytest.fixture(scope="module", params=["sim", "cuda"])
def runner(request: pytest.FixtureRequest) -> KernelRunner:
    if request.param == "cuda" and (reason := cuda_missing()):
        pytest.skip(reason)
    return KernelRunner(request.param)


def case_of(kind: int, k: int, **changes: Any) -> Case:
    return Case(kind, k, **({"abits": 16} if kind == FLOATS else {}) | changes)


@pytest.mark.parametrize("kind", [NATURAL, SLOTS, PLANES])
def test_every_bit_width(runner: KernelRunner, kind: int) -> None:
    for abits, sym, m in itertools.product(range(2, 9), (0, 1), (1, 3)):
        check(runner, case_of(kind, 67, abits=abits, symmetric=sym), tokens(m, 67, F16), order=abits)


@ORDERS
@pytest.mark.parametrize("k", [1, 2, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 1016, 1024, 1025, 1096])
def test_lengths_around_words_and_chunks(runner: KernelRunner, kind: int, k: int) -> None:
    for m in (1, 2):
        check(runner, case_of(kind, k, symmetric=m % 2), tokens(m, k, F16), order=k)
