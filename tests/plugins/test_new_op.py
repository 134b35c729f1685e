"""A new op is one folder: in the table of the library, in the self-test and in Python's hands
without a change of anything else.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from plugins.core.op_spec import GemmAttributes
from plugins.tools import build
from plugins.tools.kernels import SIMPLE, KernelLibrary, gemm_shape

PLUGINS = Path(__file__).parents[2] / "plugins"

# y = x * codes^T * scale[n] in fp32, a thread to an output, one code per word.
LAUNCH = """
#include "core/device/numeric.cuh"
#include "core/host/frame.h"

namespace anybit {
namespace {

struct ToyArgs {
  int n, k;
  const float* x;
  const int32_t* weight;
  const float* scale;
  float* y;
};

__global__ void toy_gemm(ToyArgs p) {
  const int m = blockIdx.y, n = blockIdx.x * 32 + threadIdx.x;
  if (n >= p.n) return;
  float sum = 0;
  for (int k = 0; k < p.k; ++k) sum += p.x[m * p.k + k] * float(p.weight[n * p.k + k]);
  p.y[m * p.n + n] = sum * p.scale[n] FAULT;
}

const char* name_of(int) { return "simple"; }
bool supported(const GemmShape& s) { return s.dtype == kFloat32 && s.group_size == 0; }
Plan plan_of(int, const GemmShape&, const Device&) {
  Plan plan;
  plan.runs = true;
  return plan;
}
int choose(const GemmShape&, const Device&) { return kSimple; }
size_t workspace_of(int, const GemmShape&) { return 0; }
bool has_inputs(const GemmShape&, const GemmBuffers& b) { return b.weight && b.scale; }
cudaError_t run(Config, const GemmShape& s, const GemmBuffers& b, const Device&, cudaStream_t stream) {
  const ToyArgs p = {s.n, s.k, static_cast<const float*>(b.x), b.weight, b.scale, static_cast<float*>(b.y)};
  return launch({dim3(ceil_div(s.n, 32), s.m), dim3(32)}, stream, toy_gemm, p);
}

constexpr KernelTable kTable = {"ToyGemm", 1, name_of, supported, plan_of, choose, workspace_of, has_inputs, run};
const OpRegistration registration(op_from_table<kTable>());

}  // namespace
}  // namespace anybit
"""
ORACLE = """
#include <cmath>
#include "selftest/oracle.h"

namespace {
using namespace selftest;

struct ToyOracle final : Oracle {
  ToyOracle() : Oracle("ToyGemm") {}
  std::vector<Case> cases(bool) const override {
    return {{8, 256, 16, 0, 0, 3, 40, 70, kFloat32, false}, {8, 256, 16, 0, 0, 1, 1, 1, kFloat32, false}};
  }
  Weights random_weights(const Case& c, Random& random) const override {
    Weights weights;
    for (int i = 0; i < c.n * c.k; ++i) weights.packed.push_back(random.whole(0, 255));
    for (int n = 0; n < c.n; ++n) weights.scale.push_back(float(random.uniform(0.5, 1)));
    return weights;
  }
  Output output(const Case& c, const Weights& weights, const Token& token, int n) const override {
    double sum = 0, size = 0;
    for (int k = 0; k < c.k; ++k) {
      const double term = double(token.values[k]) * weights.packed[n * c.k + k] * weights.scale[n];
      sum += term, size += std::fabs(term);
    }
    return {float(sum), float(size)};
  }
  bool exact(const Case&, int) const override { return false; }
};
const ToyOracle oracle;
}  // namespace
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources in which toy_gemm/ stands in place of the other ops, compiled without
    optimization.
    """
    sources = tmp_path / "plugins"
    leave_out = shutil.ignore_patterns("__pycache__", "*_gemm", "*.py")
    shutil.copytree(PLUGINS, sources, ignore=leave_out)
    (sources / "toy_gemm" / "cuda").mkdir(parents=True)
    (sources / "toy_gemm" / "cuda" / "launch.cu").write_text(LAUNCH.replace(" FAULT", ""))
    (sources / "toy_gemm" / "selftest.cpp").write_text(ORACLE)
    flags = sources / "build_flags.json"
    flags.write_text(flags.read_text().replace("-O2", "-O0"))
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(build, "_SOURCES", sources)
    return sources / "toy_gemm"


def selftest() -> subprocess.CompletedProcess[str]:
    command = [str(build.build_selftest()), str(build.build_sim())]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_new_op_is_one_folder(toy: Path) -> None:
    kernels = KernelLibrary(build.build_sim())
    assert kernels.ops == ("ToyGemm",)
    attrs = GemmAttributes(8, 256, 16, 0, 0, 3, 2, 0)
    shape = gemm_shape(attrs, 1, np.dtype(np.float32))
    assert kernels.tactics("ToyGemm", shape) == {SIMPLE: "simple"}
    x, y = np.array([[1, 2, 3]], np.float32), np.zeros((1, 2), np.float32)
    weight, scale = np.array([[1, 0, 1], [0, 5, 0]], np.int32), np.array([2, 0.5], np.float32)
    pointers = {"x": x, "weight": weight, "scale": scale, "y": y}
    addresses = {name: array.ctypes.data for name, array in pointers.items()}
    assert kernels.run("ToyGemm", shape, addresses) == 0
    np.testing.assert_array_equal(y, [[8, 5]])
    assert kernels.run("ToyGemm", shape, {**addresses, "scale": 0}) == 1

    right = selftest()
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.splitlines()[-1] == "CPU simulation: 6 calls, all right"

    (toy / "cuda" / "launch.cu").write_text(LAUNCH.replace("FAULT", "+ (m == 2 && n == 39)"))
    wrong = selftest()
    assert (wrong.returncode, wrong.stderr) == (3, "")
    assert wrong.stdout.startswith("ToyGemm simple W8A16 g0 3x40x70 fp32: got y[2, 39] = ")

    # One without an oracle is refused: it would be shipped untested.
    (toy / "cuda" / "other.cu").write_text(
        LAUNCH.replace("ToyGemm", "OtherGemm").replace(" FAULT", "")
    )
    refused = selftest()
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        2,
        "",
        "LIBRARY: got one with OtherGemm, ToyGemm, expected a kernel library of this version, "
        "with ToyGemm. Build it: python -m plugins build.\n",
    )
