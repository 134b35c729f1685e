"""The C++ that stands in for AMX's tile instructions: products as numpy has them, and a fault for
every way in which a processor would refuse an instruction.
"""

from __future__ import annotations

import platform
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from plugins.tools.build import build_emulated, build_onnxruntime
from plugins.tools.kernels import gemm_shape
from tests.plugins.kernel_cases import F16, abq, qqq
from tests.plugins.kernel_runner import KernelRunner, cpu_missing, cpu_tactic

PLUGINS = Path(__file__).parents[2] / "plugins"

# Reads tokens int8 [16, 64] and weights uint8 [16, 64] from stdin, writes their product twice over,
# the second time added to the first; with an argument only the case of this number.
PROGRAM = """
#define ANYBIT_SET amx
#include <cstdio>
#include <cstdlib>
#include "core/cpu/tiles.h"
using namespace anybit::cpu::amx;
alignas(64) static unsigned char tokens[1024], weights[1024];
alignas(64) static int sums[16][16];
static void configured(void (*change)(TileConfig&)) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.row_bytes[i] = 64;
  change(config);
  tile_configure(config);
}
static void misuse(int number) {
  switch (number) {
    case 0: return tile_zero<0>();
    case 1: return configured([](TileConfig& c) { c.palette = 2; });
    case 2: return configured([](TileConfig& c) { c.start_row = 1; });
    case 3: return configured([](TileConfig& c) { c.rows[3] = 17; });
    case 4: return configured([](TileConfig& c) { c.row_bytes[3] = 128; });
    case 5: return configured([](TileConfig& c) { c.rows[8] = 16; });
    case 6: return configured([](TileConfig& c) { c.rows[2] = 0; });
    case 7: configured([](TileConfig& c) { c.rows[2] = 0, c.row_bytes[2] = 0; });
            return tile_load<2>(tokens, 64);
    case 8: configured([](TileConfig&) {}); return tile_multiply_add<0, 4, 4>();
    case 9: configured([](TileConfig& c) { c.rows[4] = 8; }); return tile_multiply_add<0, 4, 6>();
    case 10: configured([](TileConfig& c) { c.row_bytes[4] = 32; });
             return tile_multiply_add<0, 4, 6>();
    case 11: configured([](TileConfig& c) { c.row_bytes[6] = 32; });
             return tile_multiply_add<0, 4, 6>();
    case 12: configured([](TileConfig& c) { c.row_bytes[4] = 62; });
             return tile_multiply_add<0, 4, 6>();
    case 13: { const TileScope scope(16); } return tile_store<0>(sums, 64);
    case 14: configured([](TileConfig&) {}); return tile_zero<8>();
  }
}
int main(int argc, char** argv) {
  if (argc > 1) return misuse(std::atoi(argv[1])), 0;
  if (std::fread(tokens, 1, 1024, stdin) + std::fread(weights, 1, 1024, stdin) != 2048) return 1;
  const TileScope scope(16);
  tile_zero<0>();
  tile_load<4>(tokens, 64);
  tile_load<6>(weights, 64);
  for (int i = 0; i < 2; ++i) {
    tile_multiply_add<0, 4, 6>();
    tile_store<0>(sums, 64);
    std::fwrite(sums, 1, sizeof sums, stdout);
    tile_load<0>(sums, 64);
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    source, made = folder / "tiles.cpp", folder / "tiles"
    emulation = PLUGINS / "core" / "cpu" / "tiles_emulated.cpp"
    flags = ["-std=c++17", "-Wall", "-DANYBIT_EMULATED_TILES", f"-I{PLUGINS}"]
    source.write_text(PROGRAM, encoding="utf-8")
    subprocess.run(["g++", *flags, str(source), str(emulation), "-o", str(made)], check=True)
    return made


def test_a_product_is_numpys(program: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(-128, 128, (16, 64), dtype=np.int8)
    weights = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)  # [k / 4, n, 4]
    done = subprocess.run(
        [str(program)], input=tokens.tobytes() + weights.tobytes(), capture_output=True, check=True
    )
    once, twice = np.frombuffer(done.stdout, np.int32).reshape(2, 16, 16)
    want = tokens.astype(np.int32) @ weights.transpose(0, 2, 1).reshape(64, 16).astype(np.int32)
    np.testing.assert_array_equal(once, want)
    np.testing.assert_array_equal(twice, 2 * want)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "tilezero: got tiles without a configuration (#UD)"),
        (1, "ldtilecfg: got an unknown palette (#GP)"),
        (2, "ldtilecfg: got a reserved byte or a start row (#GP)"),
        (3, "ldtilecfg: got more than 16 rows (#GP)"),
        (4, "ldtilecfg: got rows of more than 64 bytes (#GP)"),
        (5, "ldtilecfg: got a tile beyond the palette (#GP)"),
        (6, "ldtilecfg: got rows without bytes, or bytes without rows"),
        (7, "tileloadd: got a tile without rows (#UD)"),
        (8, "tdpbsud: got a tile twice (#UD)"),
        (9, "tdpbsud: got sums and tokens with other rows (#UD)"),
        (10, "tdpbsud: got tokens and weights of other lengths (#UD)"),
        (11, "tdpbsud: got sums and weights with other columns (#UD)"),
        (12, "tdpbsud: got rows that are not whole groups of four bytes (#UD)"),
        (13, "tilestored: got tiles without a configuration (#UD)"),
        (14, "tilezero: got a tile beyond the palette (#UD)"),
    ],
)
def test_what_a_processor_refuses(program: Path, number: int, message: str) -> None:
    done = subprocess.run([str(program), str(number)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGABRT, f"{message}, expected none\n")


def test_the_emulated_library_chooses_amx() -> None:
    if reason := cpu_missing("amx", emulated=True):
        pytest.skip(reason)
    runner = KernelRunner("emulated-amx")
    for op, attrs in (("ABQGemm", abq(64, 64)), ("QQQGemm", qqq(64, 64))):
        listed = runner.kernels.tactics(op, gemm_shape(attrs, 32, F16))
        assert listed == {cpu_tactic("amx"): "amx", cpu_tactic("avx512"): "avx512"}


def test_the_library_has_the_instructions_and_the_emulated_one_has_not() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("no x86-64")
    for library, has in ((build_onnxruntime(), True), (build_emulated(), False)):
        text = _disassembled(library)
        for instruction in ("ldtilecfg", "tileloadd", "tdpbsud", "tilestored", "tilerelease"):
            assert (instruction in text) == has, (library.name, instruction)


def _disassembled(library: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
