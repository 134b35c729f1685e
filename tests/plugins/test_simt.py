"""The CPU simulation of CUDA itself: it runs correct kernels under any thread order and notices
planted faults.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import plugins
from plugins.tools.toolkit import find_cuda_include, find_program

INVALID_CONFIGURATION = 9  # cudaErrorInvalidConfiguration
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
THREADS = 96


class Faults:
    """The kernels of simt/faults.cpp in a library of their own."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.anybit_sim_last_error.restype = ctypes.c_char_p

    def run(
        self,
        name: str,
        *,
        order: int = 1,
        grid: tuple[int, int] = (1, 1),
        threads: int = THREADS,
        forget_sync: bool = False,
    ) -> tuple[int, np.ndarray]:
        """Error code and output of one kernel on input 0, 1, 2, ..."""
        data = np.arange(threads, dtype=np.int32)
        out = np.full(grid[0] * grid[1] * threads, -1, np.int32)
        self.library.anybit_sim_set_seed(ctypes.c_uint(order))
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (data, out))
        return self.library.run_fault(
            name.encode(), *grid, threads, *pointers, int(forget_sync)
        ), out

    def message(self) -> str:
        """Text of the last failure."""
        return str(self.library.anybit_sim_last_error().decode())


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    sources = Path(plugins.__file__).parent
    library = tmp_path_factory.mktemp("simt") / "libfaults.so"
    flags = json.loads((sources / "build_flags.json").read_text(encoding="utf-8"))["sim"]
    includes = ["-I", str(sources), "-isystem", str(find_cuda_include())]
    fault_source = str(Path(__file__).parent / "simt" / "faults.cpp")
    command = [
        find_program("g++", "g++"),
        *flags,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        *includes,
        fault_source,
    ]
    subprocess.run([*command, "-o", str(library)], check=True)
    return Faults(library)


@pytest.mark.parametrize("order", range(8))
def test_barriers_make_the_order_irrelevant(faults: Faults, order: int) -> None:
    expected = np.arange(THREADS)[::-1]
    code, out = faults.run("reverse", order=order)
    assert code == 0
    np.testing.assert_array_equal(out, expected)
    code, out = faults.run("reverse_rounds", order=order)
    assert code == 0
    np.testing.assert_array_equal(out, 3 * expected + 3)


@pytest.mark.parametrize("name", ["reverse", "reverse_rounds"])
def test_a_missing_barrier_gives_wrong_results(faults: Faults, name: str) -> None:
    for order in range(1, 8):
        code, right = faults.run(name, order=order)
        assert code == 0
        code, wrong = faults.run(name, order=order, forget_sync=True)
        assert code == 0
        assert (wrong != right).any(), f"thread order {order} hides the fault"


def test_unwritten_shared_memory_is_poison(faults: Faults) -> None:
    _, out = faults.run("reverse", order=0, forget_sync=True)
    assert out[0] == np.int32(np.uint32(0xCBCBCBCB).astype(np.int32))


@pytest.mark.parametrize("order", range(4))
def test_warp_collectives(faults: Faults, order: int) -> None:
    code, out = faults.run("warp_steps", order=order)
    lane = np.arange(THREADS) % 32
    assert code == 0
    np.testing.assert_array_equal(out, (lane ^ 16) * 2 + lane % 2)


@pytest.mark.parametrize("order", range(3))
def test_every_block_of_a_large_grid_runs_once(faults: Faults, order: int) -> None:
    code, out = faults.run("every_thread", order=order, grid=(37, 11))
    assert code == 0
    np.testing.assert_array_equal(out, np.arange(37 * 11 * THREADS))


@pytest.mark.parametrize("order", range(6))
def test_bulk_copies_arrive_before_the_wait_ends_and_not_much_sooner(
    faults: Faults, order: int
) -> None:
    code, out = faults.run("bulk_copy", order=order)
    assert code == 0
    np.testing.assert_array_equal(out, np.arange(THREADS) % 4)
    if order % 2 or not order:  # even orders let copies arrive at once
        _, out = faults.run("bulk_copy", order=order, forget_sync=True)
        assert (out == np.int32(np.uint32(0xCBCBCBCB).astype(np.int32))).all()


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_product_reads_its_rows_until_it_is_waited_for(faults: Faults, order: int) -> None:
    assert faults.run("late_product", order=order)[1].tolist() == [32] * THREADS
    assert faults.run("late_product", order=order, forget_sync=True)[1].tolist() == [64] * THREADS


@pytest.mark.parametrize(
    ("name", "threads", "message"),
    [
        (
            "nobody_arrives",
            32,
            "simt: deadlock, block (0,0,0) thread (0,0,0) waits at an mbarrier that another "
            "thread never reaches",
        ),
        (
            "lonely_part",
            64,
            "simt: deadlock, block (0,0,0) thread (0,0,0) waits at barrier.sync that another "
            "thread never reaches",
        ),
        ("product_without_fence", 32, "simt: wgmma without wgmma.fence before it"),
        ("too_many_arrivals", 32, "simt: more arrivals at an mbarrier than it was told to expect"),
        (
            "bulk_of_12_bytes",
            32,
            "simt: cp.async.bulk of 12 bytes: size and addresses must be multiples of 16",
        ),
        (
            "divergent_barrier",
            96,
            "simt: deadlock, block (0,0,0) thread (0,0,0) waits at __syncthreads that another "
            "thread never reaches",
        ),
        (
            "early_exit",
            96,
            "simt: deadlock, block (0,0,0) thread (0,0,0) waits at __syncthreads that another "
            "thread never reaches",
        ),
        (
            "shared_overrun",
            96,
            "simt: a thread of block (0,0,0) wrote past its 384 bytes of shared memory",
        ),
        ("partial_warp", 16, "simt: warp collective in a warp of fewer than 32 threads"),
    ],
)
def test_faults_are_reported_and_leave_the_simulation_usable(
    faults: Faults, name: str, threads: int, message: str
) -> None:
    code, _ = faults.run(name, order=0, threads=threads)
    assert code == LAUNCH_FAILURE
    assert faults.message() == message
    code, out = faults.run("reverse")
    assert code == 0
    np.testing.assert_array_equal(out, np.arange(THREADS)[::-1])


@pytest.mark.parametrize(
    ("grid", "threads"), [((1, 65536), 32), ((0, 1), 32), ((1, 1), 1056), ((1, 1), 0)]
)
def test_launches_that_hardware_refuses(
    faults: Faults, grid: tuple[int, int], threads: int
) -> None:
    code, _ = faults.run("every_thread", grid=grid, threads=threads)
    assert code == INVALID_CONFIGURATION
