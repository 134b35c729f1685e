"""The CPU kernels of the GEMMs as AArch64 code under qemu-user: the self-test, and the test bodies of
the kernels of this machine.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from plugins.tools.build import build_aarch64
from plugins.tools.kernels import GemmBuffers, GemmShape
from tests.plugins import test_cpu, test_kernels
from tests.plugins.kernel_cases import F16, LEVELS, abq, abq_arrays, op_of, qqq, tokens
from tests.plugins.kernel_runner import KernelError, KernelRunner, Memory

pytestmark = pytest.mark.slow

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PLUGINS = Path(__file__).parents[2] / "plugins"

# Calls the library that it is given. A request is one op's name, its shape, and bytes by GemmBuffers,
# of which a negative size is a null pointer; with no x it asks for the workspace.
SERVER = """
#include <dlfcn.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "core/host/params.h"
static bool get(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
static void put(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }
int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  const AnybitOp* ops;
  const int count = reinterpret_cast<int (*)(const AnybitOp**)>(dlsym(library, "anybit_ops"))(&ops);
  char name[16];
  GemmShape shape;
  while (get(name, sizeof name) && get(&shape, sizeof shape)) {
    const AnybitOp* op = ops;
    while (op < ops + count && std::strcmp(op->name, name)) ++op;
    void* buffers[10];
    int64_t sizes[10];
    for (int i = 0; i < 10; ++i) {
      get(&sizes[i], 8);
      buffers[i] = sizes[i] < 0 ? nullptr : std::aligned_alloc(256, (sizes[i] + 256) / 256 * 256);
      if (buffers[i]) get(buffers[i], size_t(sizes[i]));
    }
    if (buffers[0]) {
      const int code = op->run(&shape, reinterpret_cast<GemmBuffers*>(buffers), nullptr);
      put(&code, sizeof code);
      put(buffers[6], size_t(sizes[6]));
    } else {
      const int64_t bytes = int64_t(op->workspace(&shape));
      put(&bytes, sizeof bytes);
    }
    std::fflush(stdout);
    for (void* buffer : buffers) std::free(buffer);
  }
}
"""


@pytest.fixture(scope="module")
def built() -> tuple[Path, Path]:
    """Library and self-test."""
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this machine")
    return build_aarch64(COMPILER)


def emulated(cpu: str, *command: object) -> list[str]:
    return [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, *map(str, command)]


class AArch64Kernels:
    """What KernelRunner wants of a KernelLibrary, in a process of its own."""

    def __init__(self, server: Path, library: Path) -> None:
        command = emulated("max", server, library)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _ask(self, op: str, shape: GemmShape, content: Mapping[str, bytes], answer: int) -> bytes:
        assert self.process.stdin is not None and self.process.stdout is not None
        request = [op.encode().ljust(16, b"\0"), bytes(shape)]
        for name, _ in GemmBuffers._fields_:
            part = content.get(name)
            request += [struct.pack("q", -1 if part is None else len(part)), part or b""]
        self.process.stdin.write(b"".join(request))
        self.process.stdin.flush()
        got = self.process.stdout.read(answer)
        assert len(got) == answer, f"the kernels ended with {self.process.wait()}"
        return got

    def workspace_bytes(self, op: str, shape: GemmShape) -> int:
        return int(struct.unpack("q", self._ask(op, shape, {}, 8))[0])

    def run(self, op: str, shape: GemmShape, memory: Mapping[str, Memory]) -> int:
        content = {name: part.payload.tobytes() for name, part in memory.items()}
        got = self._ask(op, shape, content, 4 + memory["y"].size)
        memory["y"].payload[:] = bytearray(got[4:])
        return int(struct.unpack("i", got[:4])[0])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class AArch64Runner(KernelRunner):
    """The kernels of an AArch64 instruction set."""

    kernels: AArch64Kernels  # type: ignore[assignment]

    def __init__(self, kernels: AArch64Kernels, isa: str) -> None:
        self.kind, self.isa, self.kernels = "aarch64", isa, kernels

    def launch(self, op: str, shape: GemmShape, memory: Mapping[str, Memory]) -> None:
        if code := self.kernels.run(op, shape, memory):
            raise KernelError(code, "refused")


@pytest.fixture(scope="module")
def kernels(
    built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AArch64Kernels]:
    folder = tmp_path_factory.mktemp("aarch64")
    source, server = folder / "server.cpp", folder / "server"
    source.write_text(SERVER, encoding="utf-8")
    flags = ["-std=c++17", "-O1", f"-I{PLUGINS}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(server), "-ldl"], check=True)
    made = AArch64Kernels(server, built[0])
    yield made
    made.close()


@pytest.fixture(params=["portable", "neon"])
def runner(request: pytest.FixtureRequest, kernels: AArch64Kernels) -> KernelRunner:
    return AArch64Runner(kernels, request.param)


@pytest.mark.parametrize(
    ("cpu", "sets"), [("max", {"portable", "neon"}), ("cortex-a53", {"portable"})]
)
def test_the_selftest_passes_with_the_sets_of_the_processor(
    built: tuple[Path, Path], cpu: str, sets: set[str]
) -> None:
    library, program = built
    command = emulated(cpu, program, library, "--quick")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "Gemm" in line]
    assert {(row[0], row[1]) for row in rows} == {
        (op, isa) for op in ("ABQGemm", "QQQGemm") for isa in sets
    }


def test_every_bit_width(runner: KernelRunner) -> None:
    for w in LEVELS:
        for m, sym, g in ((1, 1, 128), (3, 0, 0), (14, 0, 128)):
            attrs = abq(37, 384, w=w, sym=sym, g=g, bias=m % 2)
            test_cpu.check(runner, attrs, abq_arrays(attrs), tokens(m, 384, F16))


@pytest.mark.parametrize(("k", "g"), [(640, 64), (768, 384), (560, 112), (320, 32), (300, 60)])
def test_groups_of_vectors_lanes_and_others(runner: KernelRunner, k: int, g: int) -> None:
    test_cpu.test_groups_of_lanes_halves_and_others(runner, k, g, 4)
    test_cpu.test_minimums_of_few_and_many_tokens(runner, k, g, 1)


def test_qqq_rows_and_blocks(runner: KernelRunner) -> None:
    for k, g, n, m in ((527, 0, 191, 3), (320, 64, 130, 5), (512, 128, 70, 9), (100, 0, 65, 1)):
        attrs = qqq(n, k, g=g, bias=n % 2)
        arrays = test_cpu.qqq_arrays(attrs)
        assert op_of(arrays) == "QQQGemm"
        test_cpu.check(runner, attrs, arrays, tokens(m, k, F16))


def test_bodies_of_all_kernels(runner: KernelRunner) -> None:
    test_cpu.test_blocks_and_slabs_of_tokens(runner, 97)
    test_cpu.test_long_sums(runner, 2)
    test_cpu.test_weight_only_tokens_of_zeros_and_not_finite_ones(runner, 48)
    test_kernels.test_extreme_finite_inputs(runner)
    test_kernels.test_rows_with_nan_or_inf_are_nan_and_only_those(runner)
    test_kernels.test_zero_points_far_outside_the_code_range(runner)
