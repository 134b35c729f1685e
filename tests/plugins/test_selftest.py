"""anybit-selftest in the CPU simulation: all right there, exit code 3 for a library with one wrong output, 2 for what cannot run."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from plugins.build import build_library, build_selftest, build_sim
from tests.plugins.kernel_runner import cuda_missing

# A library that passes every call on, and then changes the last byte of y in calls with 7 tokens.
SHIM = """
#include <dlfcn.h>
#include "core/params.h"
static void* library() { static void* opened = dlopen(REAL, RTLD_NOW); return opened; }
template <class F> static F* real(const char* name) { return reinterpret_cast<F*>(dlsym(library(), name)); }
#define OP(name) \\
  ANYBIT_API size_t name##_workspace(const GemmShape* s) { return real<size_t(const GemmShape*)>(#name "_workspace")(s); } \\
  ANYBIT_API int name##_tactics(const GemmShape* s, int32_t* t, int n) { \\
    return real<int(const GemmShape*, int32_t*, int)>(#name "_tactics")(s, t, n); } \\
  ANYBIT_API const char* name##_kernel(int32_t t) { return real<const char*(int32_t)>(#name "_kernel")(t); } \\
  ANYBIT_API int name(const GemmShape* s, const GemmBuffers* b, void* stream) { \\
    const int code = real<int(const GemmShape*, const GemmBuffers*, void*)>(#name)(s, b, stream); \\
    if (s->m == 7) static_cast<unsigned char*>(b->y)[size_t(s->m) * s->n * 2 - 1 + PAST] ^= 0x40; \\
    return code; }
OP(anybit_abq_gemm)
OP(anybit_qqq_gemm)
ANYBIT_API void anybit_sim_set_seed(unsigned) {}
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(build_selftest()), *map(str, arguments)], capture_output=True, text=True, check=False)


def shim(folder: Path, past: int) -> Path:
    source, library = folder / "shim.cpp", folder / "libshim.so"
    source.write_text(SHIM)
    plugins = Path(__file__).parents[2] / "plugins"
    defines = [f'-DREAL="{build_sim()}"', f"-DPAST={past}"]
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", *defines, f"-I{plugins}", str(source), "-ldl", "-o", str(library)], check=True)
    return library


def test_every_kernel_is_right() -> None:
    done = run(build_sim(), "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("CPU simulation: ")
    assert done.stdout.splitlines()[-1].endswith(" calls, all right")
    for kernel in ("ABQGemm  int8 64x8", "ABQGemm  b1 64x8", "ABQGemm  a16 64x8", "QQQGemm  int8 64x8", "QQQGemm  simple"):
        assert f"\n{kernel} " in done.stdout


def test_a_wrong_output_is_a_mismatch(tmp_path: Path) -> None:
    done = run(shim(tmp_path, 0), "--quick", "--kernel", "int8 64x8")
    assert done.returncode == 3
    assert "QQQGemm int8 64x8 W4A8 sym g64 7x66x256 fp16: got outputs that differ, expected those of the CPU" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("MISMATCHES")


def test_a_write_past_the_output_is_a_mismatch(tmp_path: Path) -> None:
    done = run(shim(tmp_path, 1), "--quick", "--op", "QQQGemm", "--kernel", "int8 64x8")
    assert done.returncode == 3
    assert "QQQGemm int8 64x8 W4A8 sym g64 7x66x256 fp16: wrote past its buffers" in done.stdout
    assert "ABQGemm" not in done.stdout


def test_errors(tmp_path: Path) -> None:
    usage = "Use: anybit-selftest LIBRARY [--quick] [--op ABQGemm|QQQGemm] [--kernel NAME] [--seed N] [--list]."
    assert run().stderr == f"LIBRARY: got none, expected a kernel library. {usage}\n"
    assert run("--fast").stderr == f"--fast: got this argument, expected none such. {usage}\n"
    assert run("library", "--op").stderr == f"--op: got no value, expected one. {usage}\n"
    missing = run(tmp_path / "none.so")
    assert missing.returncode == 2
    assert missing.stderr.endswith("expected a kernel library. Build it: python -m plugins build.\n")
    nothing = run(build_sim(), "--quick", "--kernel", "int9")
    assert (nothing.returncode, nothing.stdout.splitlines()[-1]) == (2, "nothing was checked: no kernel fits the options")


def test_without_a_gpu() -> None:
    if not cuda_missing():
        pytest.skip("there is one")
    done = run(build_library(), "--quick")
    assert done.returncode == 2
    assert done.stderr.startswith("GPU: got ")
    assert done.stderr.endswith("Without a GPU give the library of the CPU simulation (python -m plugins selftest --sim).\n")


def test_list_and_seed() -> None:
    listed = run(build_sim(), "--list").stdout.splitlines()
    assert "ABQGemm W2*A8 g0 9x70x320 fp16" in listed
    assert len(listed) > len(run(build_sim(), "--list", "--quick").stdout.splitlines()) > 100
    assert run(build_sim(), "--quick", "--op", "QQQGemm", "--seed", "5").returncode == 0


def test_struct_of_the_tests_is_that_of_the_library() -> None:
    """ctypes and C++ agree on GemmShape: 11 integers."""
    from tests.plugins.kernel_runner import GemmShape

    assert ctypes.sizeof(GemmShape) == 44
