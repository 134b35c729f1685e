"""anybit-selftest in the CPU simulation: all right there, exit code 3 for a library that goes wrong
once, 2 for what cannot run.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from plugins.tools.build import build_library, build_onnxruntime, build_selftest, build_sim
from plugins.tools.kernels import GemmShape
from plugins.tools.toolkit import find_cuda_include
from tests.plugins.kernel_runner import cuda_missing

PLUGINS = Path(__file__).parents[2] / "plugins"
USAGE = (
    "Use: anybit-selftest LIBRARY [--quick] [--op ABQGemm|QQQGemm] [--kernel NAME] [--seed "
    "N] [--list] [--help]"
)

# A library that passes every call on to the simulation, and then does CHANGE in calls with 7
# tokens.
SHIM = """
#include <dlfcn.h>
#include <cmath>
#include "core/host/params.h"
static const AnybitOp* real;
template <int kOp> int changed_run(const GemmShape* s, const GemmBuffers* b, void* stream) {
  int code = real[kOp].run(s, b, stream);
  unsigned char* y = static_cast<unsigned char*>(b->y);
  const size_t y_bytes = size_t(s->m) * s->n * 2;
  if (s->m == 7 && y_bytes) { CHANGE; }
  return code;
}
ANYBIT_API int anybit_ops(const AnybitOp** ops) {
  static AnybitOp changed[2];
  void* library = dlopen("REAL", RTLD_NOW);
  if (reinterpret_cast<int (*)(const AnybitOp**)>(dlsym(library, "anybit_ops"))(&real) != 2) return 0;
  changed[0] = real[0], changed[0].run = changed_run<0>;
  changed[1] = real[1], changed[1].run = changed_run<1>;
  *ops = changed;
  return COUNT;
}
"""
# what tells the simulation from the library for GPUs
SIMULATED = "ANYBIT_API void anybit_sim_set_seed(unsigned) {}\n"

# The CUDA driver on host memory; the real header holds the names and types to those of the real
# one.
DRIVER = """
#include <cuda.h>
#include <cstdlib>
#include <cstring>
#define FAKE extern "C" CUresult CUDAAPI
static int setting(const char* name) { const char* text = std::getenv(name); return text ? std::atoi(text) : 0; }
static int syncs = 0, captured = 0;
FAKE cuInit(unsigned) { return CUresult(setting("FAKE_INIT")); }
FAKE cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
FAKE cuDeviceGetName(char* name, int, CUdevice) { return std::strcpy(name, "Fake GPU"), CUDA_SUCCESS; }
FAKE cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  if (attribute != CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) return CUDA_ERROR_INVALID_VALUE;
  return *value = setting("FAKE_CAPABILITY"), CUDA_SUCCESS;
}
FAKE cuDevicePrimaryCtxRetain(CUcontext*, CUdevice) { return CUDA_SUCCESS; }
FAKE cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
FAKE cuCtxSynchronize() { return ++syncs == setting("FAKE_FAULT") ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS; }
FAKE cuStreamCreate(CUstream*, unsigned flags) { return flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
static void* host(CUdeviceptr memory) { return reinterpret_cast<void*>(memory); }
FAKE cuMemAlloc(CUdeviceptr* memory, size_t bytes) {
  return *memory = CUdeviceptr(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), CUDA_SUCCESS;
}
FAKE cuMemFree(CUdeviceptr memory) { return std::free(host(memory)), CUDA_SUCCESS; }
FAKE cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) { return std::memcpy(host(to), from, bytes), CUDA_SUCCESS; }
FAKE cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) { return std::memcpy(to, host(from), bytes), CUDA_SUCCESS; }
FAKE cuStreamBeginCapture(CUstream, CUstreamCaptureMode) { return captured = 1, CUDA_SUCCESS; }
FAKE cuStreamEndCapture(CUstream, CUgraph*) { return captured && !setting("FAKE_CAPTURE") ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
FAKE cuGraphInstantiateWithFlags(CUgraphExec*, CUgraph, unsigned long long flags) { return flags ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS; }
FAKE cuGraphLaunch(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
FAKE cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
FAKE cuGraphDestroy(CUgraph) { return CUDA_SUCCESS; }
"""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(build_selftest()), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def compiled(folder: Path, name: str, text: str, include: Path = PLUGINS) -> Path:
    source, library = folder / f"{name}.cpp", folder / name
    source.write_text(text)
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-I{include}",
            str(source),
            "-ldl",
            "-o",
            str(library),
        ],
        check=True,
    )
    return library


def shim(folder: Path, change: str, simulated: bool = True, ops: int = 2) -> Path:
    """The library SHIM; of its ops, it shows as many as `ops`."""
    text = SHIM.replace("REAL", str(build_sim())).replace("CHANGE", change)
    text = text.replace("COUNT", str(ops)) + (SIMULATED if simulated else "")
    return compiled(folder, "libshim.so", text)


def test_the_native_kernels_of_this_cpu_are_right() -> None:
    done = run(build_onnxruntime(), "--quick", "--op", "QQQGemm")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("CPU: ")
    assert done.stdout.splitlines()[-1].endswith(" calls, all right")
    assert "\nQQQGemm  portable " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "ops"),
    [
        ("simple", {"ABQGemm", "QQQGemm"}),
        ("int8 64x8", {"ABQGemm", "QQQGemm"}),
        ("b1 64x8", {"ABQGemm"}),
        ("a16 64x8", {"ABQGemm"}),
        ("wgmma 128x64", {"ABQGemm"}),
        ("wgmma 256x64", {"QQQGemm"}),
    ],
)
def test_every_family_of_kernels_is_right(kernel: str, ops: set[str]) -> None:
    """A tile of each; test_tactics.py has all of them."""
    done = run(build_sim(), "--quick", "--kernel", kernel)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("CPU simulation: ")
    assert done.stdout.splitlines()[-1].endswith(" calls, all right")
    table = [line for line in done.stdout.splitlines() if f"Gemm  {kernel} " in line]
    assert {line.split()[0] for line in table} == ops


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("y[y_bytes - 1] ^= 0x40", "got y[6, 65] = "),
        ("__builtin_memset(y, 0xff, 2)", "got y[0, 0] = "),  # a NaN
        ("y[y_bytes] = 0", "got writes past the buffers, expected none"),
        (
            "static_cast<unsigned char*>(b->workspace)[-1] = 0",
            "got writes past the buffers in a graph, expected none",
        ),
        (
            "const_cast<float*>(b->scale)[s->n - 1] += 1",
            "got inputs that changed, expected them as they were",
        ),
        ("code = 98", "got CUDA error 98, expected success"),
    ],
    ids=["value", "nan", "past y", "before workspace", "input", "error"],
)
def test_what_goes_wrong_once_is_a_mismatch(tmp_path: Path, change: str, problem: str) -> None:
    done = run(shim(tmp_path, change), "--quick", "--op", "QQQGemm", "--kernel", "int8 64x8")
    assert (done.returncode, done.stderr) == (3, "")
    assert f"QQQGemm int8 64x8 W4A8 sym g64 7x66x256 fp16: {problem}" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(
        " MISMATCHES; do not use these kernels here, report the lines above"
    )
    assert "ABQGemm" not in done.stdout


def test_many_failures_are_counted(tmp_path: Path) -> None:
    done = run(
        shim(tmp_path, "} y[0] ^= 0x40; {"), "--quick", "--op", "QQQGemm", "--kernel", "int8 64x8"
    )
    assert done.returncode == 3
    assert (
        done.stdout.count("\nQQQGemm int8 64x8 W4A8") == 19
    )  # the first line has no line before it
    assert " failures more)\n" in done.stdout


def test_errors(tmp_path: Path) -> None:
    for arguments, message in (
        ([], f"LIBRARY: got none, expected a kernel library. {USAGE}."),
        (["--fast"], f"--fast: got this argument, expected none such. {USAGE}."),
        (["library", "--op"], f"--op: got no value, expected one. {USAGE}."),
        (["library", "--op", "Gemm"], f"--op: got Gemm, expected ABQGemm or QQQGemm. {USAGE}."),
        (
            ["library", "--seed", "x1"],
            f"--seed: got x1, expected a whole number of at most 9 digits. {USAGE}.",
        ),
        (
            ["library", "--seed", "-1"],
            f"--seed: got -1, expected a whole number of at most 9 digits. {USAGE}.",
        ),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
    missing = run(tmp_path / "none.so")
    assert missing.returncode == 2
    assert missing.stderr.endswith(
        "expected a kernel library. Build it: python -m plugins build.\n"
    )
    for library, found in (
        (compiled(tmp_path, "other.so", "int answer = 42;"), "no ops"),
        (shim(tmp_path, "", ops=1), "ABQGemm"),
    ):
        other = run(library)
        assert (other.returncode, other.stdout, other.stderr) == (
            2,
            "",
            f"LIBRARY: got one with {found}, expected a kernel library of this version, with "
            "ABQGemm, QQQGemm. Build it: python -m plugins build.\n",
        )
    nothing = run(build_sim(), "--quick", "--op", "QQQGemm", "--kernel", "int9")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith(
        "--kernel: got int9, expected one that runs here: int8 256x64, int8 64x16, "
    )
    assert nothing.stderr.endswith(f", wgmma 256x64. {USAGE}.\n")


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{USAGE}\n")
    assert "Exit code 0: all right; 3: a mismatch; 2: " in done.stdout


def test_without_a_gpu() -> None:
    if not cuda_missing():
        pytest.skip("there is one")
    done = run(build_library(), "--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("GPU: got ")
    assert done.stderr.endswith(
        ", expected one of compute capability 8.0 or later. Without a GPU give the library of the CPU "
        "simulation (python -m plugins selftest --sim).\n"
    )


def test_gpu_through_a_driver_on_host_memory(tmp_path: Path) -> None:
    """Names, types and order of the driver's calls, without a GPU: a driver too old, none usable, a
    fault in mid-run.
    """
    compiled(tmp_path, "libcuda.so.1", DRIVER, find_cuda_include())
    library, few = (
        shim(tmp_path, "", simulated=False),
        ("--quick", "--op", "QQQGemm", "--kernel", "int8 64x8"),
    )

    def on_gpu(**settings: str) -> subprocess.CompletedProcess[str]:
        return run(library, *few, LD_LIBRARY_PATH=str(tmp_path), **settings)

    right = on_gpu(FAKE_CAPABILITY="9")
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.splitlines()[-1].startswith("Fake GPU: ")
    fix = (
        "Without a GPU give the library of the CPU simulation (python -m plugins selftest --sim).\n"
    )
    old = on_gpu(FAKE_CAPABILITY="7")
    assert (old.returncode, old.stderr) == (
        2,
        f"GPU: got Fake GPU of compute capability 7.x, expected one of compute capability 8.0 "
        f"or later. {fix}",
    )
    none = on_gpu(FAKE_INIT="100")
    assert (none.returncode, none.stderr) == (
        2,
        f"GPU: got error 100 from cuInit, expected one of compute capability 8.0 or later. {fix}",
    )
    fault = on_gpu(FAKE_CAPABILITY="9", FAKE_FAULT="5")
    assert (fault.returncode, fault.stderr) == (3, "")
    first = fault.stdout.splitlines()[0]
    assert first.startswith("QQQGemm int8 64x8 W4A8 sym g0 ")
    assert first.endswith(
        ": got error 700 from cuCtxSynchronize, expected success; the cases after it were not run"
    )


def test_a_launch_error_on_a_gpu_does_not_end_the_run(tmp_path: Path) -> None:
    """It would spoil the capture of the graph, which then is not tried: one failure for each call,
    and a verdict.
    """
    compiled(tmp_path, "libcuda.so.1", DRIVER, find_cuda_include())
    library, few = (
        shim(tmp_path, "} code = 98; {", simulated=False),
        ("--quick", "--op", "QQQGemm", "--kernel", "int8 64x8"),
    )
    done = run(library, *few, LD_LIBRARY_PATH=str(tmp_path), FAKE_CAPABILITY="9", FAKE_CAPTURE="1")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.count("got CUDA error 98, expected success") == 20
    assert "cuStreamEndCapture" not in done.stdout


@pytest.mark.slow
def test_list_and_seed() -> None:
    listed = run(build_sim(), "--list").stdout.splitlines()
    assert "ABQGemm W2*A8 g0 9x70x320 fp16" in listed
    assert len(listed) > len(run(build_sim(), "--list", "--quick").stdout.splitlines()) > 100
    assert {
        line.split()[0]
        for line in run(build_sim(), "--list", "--op", "QQQGemm").stdout.splitlines()
    } == {"QQQGemm"}
    few = ("--quick", "--op", "QQQGemm", "--kernel", "int8 64x8")
    assert run(build_sim(), *few, "--seed", "5").returncode == 0


def test_struct_of_the_tests_is_that_of_the_library() -> None:
    """ctypes and C++ agree on GemmShape: 12 integers and a float."""
    assert ctypes.sizeof(GemmShape) == 52
