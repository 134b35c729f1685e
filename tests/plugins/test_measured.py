"""Measured kernels take the place of the rules: which row serves which number of tokens, and the rows that the benchmark writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.gemm import measured_rows
from benchmarks.gemm_cases import SCHEMES

PLUGINS = Path(__file__).parents[2] / "plugins"
PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "core/measured.h"
using namespace anybit;
const Measured rows[] = {
#include "rows.inc"
    {},
};
int main() {
  const Device gpu{90, 132, 0, 0}, other{80, 108, 0, 0};
  for (const int m : {1, 2, 8, 16, 17, 5000}) {
    const GemmShape shape{m, 4096, 4096, 0, 4, 4, 16, 8, 1, 0, 0};
    const Measured* row = find_measured(rows, "QQQGemm", shape, gpu);
    std::printf("%d: %s %d\\n", m, row->kernel, row->shares);
  }
  GemmShape shape{1, 4096, 4096, 128, 4, 4, 16, 8, 1, 0, 0};
  std::printf("%d", find_measured(rows, "QQQGemm", shape, gpu) != nullptr);
  shape.group_size = 0;
  std::printf("%d", find_measured(rows, "ABQGemm", shape, gpu) != nullptr);
  std::printf("%d\\n", find_measured(rows, "QQQGemm", shape, other) != nullptr);
}
"""


def test_rows_that_the_benchmark_writes_are_found(tmp_path: Path) -> None:
    w4 = SCHEMES[0]

    def row(m: int, kernel: str, shares: int, median: float) -> dict[str, object]:
        return {"scheme": w4.name, "n": 4096, "k": 4096, "m": m, "kernel": kernel, "tactic": 64 * 2 + shares, "median": median}

    rows = [row(1, "int8 64x16", 4, 9.0), row(1, "int8 64x8", 5, 8.0), row(16, "int8 64x16", 3, 9.0), row(64, "int8 256x64", 2, 20.0)]
    rows.append({**row(1, "cuBLAS", 0, 1.0), "scheme": "fp16"})
    text = measured_rows({"device": "GPU", "date": "today", "capability": "9.0", "multiprocessors": 132, "rows": rows}, [w4])
    assert text.splitlines()[1] == '{90, 132, "QQQGemm", 4, 16, 8, 0, 4096, 4096, 1, "int8 64x8", 5},'
    (tmp_path / "rows.inc").write_text(text)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{PLUGINS}", f"-I{tmp_path}", str(tmp_path / "main.cpp"), "-o"]
    subprocess.run([*command, str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["1: int8 64x8 5", "2: int8 64x16 3", "8: int8 64x16 3", "16: int8 64x16 3", "17: int8 256x64 2",
                     "5000: int8 256x64 2", "000"]
