"""How kernels are started, against a CUDA runtime of ours that counts: what a kernel needs is asked
once for each device.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

PLUGINS = Path(__file__).parents[2] / "plugins"

RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
using cudaStream_t = void*;
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct cudaLaunchAttribute { int id; struct { int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; unsigned numAttrs;
};
struct cudaFuncAttributes { int ptxVersion; };
inline int device = 0, asked = 0, told = 0, refused = 0, started = 0;
inline std::map<std::pair<const void*, int>, int> granted;
inline cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F*) {
  return ++asked, a->ptxVersion = device ? 80 : 90, cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F* f, cudaFuncAttribute, int bytes) {
  if (bytes > 227 << 10) return ++refused, cudaErrorInvalidValue;
  return ++told, granted[{reinterpret_cast<const void*>(f), device}] = bytes, cudaSuccess;
}
template <class F, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, F* f, A...) {
  const auto key = std::make_pair(reinterpret_cast<const void*>(f), device);
  if (c->dynamicSmemBytes > 48 << 10 && size_t(granted[key]) < c->dynamicSmemBytes) return cudaErrorInvalidValue;
  return ++started, cudaSuccess;
}
"""
PROGRAM = """
#define __CUDACC__
#include "core/host/launch.h"
#include <cstdio>
using namespace anybit;
void one(int) {}
void two(int v) { std::printf("%d", v); }
int main() {
  int failed = 0;
  const auto both = [&](size_t bytes) {
    for (void (*kernel)(int) : {one, two}) {
      if (waits_for_earlier_launch(kernel) != (device == 0)) ++failed;
      if (launch({dim3(), dim3(), bytes}, nullptr, kernel, 1)) ++failed;
    }
  };
  const auto say = [&] {
    std::printf("%d asked, %d told, %d refused, %d started, %d failed\\n", asked, told, refused, started, failed);
  };
  for (int i = 0; i < 5; ++i) both(60000);
  say();
  for (int i = 0; i < 6; ++i) device = i % 2, both(60000);
  say();
  both(60100), both(227 << 10);
  say();
  for (int i = 0; i < 3; ++i) both(227 << 10);
  say();
  granted.clear(), both(60000);
  say();
  both(228 << 10);
  say();
}
"""


def test_what_a_kernel_needs_is_asked_once_for_each_device(tmp_path: Path) -> None:
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    source, program = tmp_path / "main.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            f"-I{tmp_path}",
            f"-I{PLUGINS}",
            str(source),
            "-o",
            str(program),
        ],
        check=True,
    )
    assert subprocess.run(
        [str(program)], capture_output=True, text=True, check=True
    ).stdout.splitlines() == [
        "2 asked, 2 told, 0 refused, 10 started, 0 failed",
        "4 asked, 4 told, 0 refused, 22 started, 0 failed",
        # 60100 bytes are as many KiB as 60000; 227 are more
        "4 asked, 6 told, 0 refused, 26 started, 0 failed",
        "4 asked, 6 told, 0 refused, 32 started, 0 failed",  # the size of last time
        "4 asked, 8 told, 0 refused, 34 started, 0 failed",  # a context that was reset
        # more than the GPU has: each kernel is refused once
        "4 asked, 8 told, 2 refused, 34 started, 2 failed",
    ]
