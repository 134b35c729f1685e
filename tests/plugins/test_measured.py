"""Measured kernels take the place of the rules: which row serves which number of tokens, and the
rows that the benchmark writes.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.gemm_cases import SCHEMES
from benchmarks.gemm_tables import measured_rows, merged_table
from plugins.tools.toolkit import find_cuda_include

PLUGINS = Path(__file__).parents[2] / "plugins"
LOOKUP = """
#include <cstdio>
#include <initializer_list>
#include "core/host/measured.h"
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
  for (const int m : {16, 17}) {
    const GemmShape few{m, 8192, 4096, 0, 4, 4, 16, 8, 1, 0, 0};
    std::printf("%d", find_measured(rows, "QQQGemm", few, gpu) != nullptr);
  }
  GemmShape shape{1, 4096, 4096, 128, 4, 4, 16, 8, 1, 0, 0};
  std::printf("%d", find_measured(rows, "QQQGemm", shape, gpu) != nullptr);
  shape.group_size = 0;
  std::printf("%d", find_measured(rows, "ABQGemm", shape, gpu) != nullptr);
  std::printf("%d\\n", find_measured(rows, "QQQGemm", shape, other) != nullptr);
}
"""

# The default choice of QQQGemm for 4 tokens, on GPUs with and without room for the measured kernel.
CHOICE = """
#include <cstdio>
#include "core/host/frame.h"
#include "qqq_gemm/cuda/config.h"
using namespace anybit;
const char* name_of(int kernel) { return kQqqKernels[kernel].name; }
const KernelTable table = {"QQQGemm", kQqqKernelCount, name_of, nullptr, qqq_plan, qqq_choose, nullptr, nullptr, nullptr};
int main() {
  for (const int n : {4096, 4097, 4098})
    for (const int room : {227 << 10, 64 << 10}) {
      const Device gpu{90, 132, room, room + 1024};
      GemmShape shape{4, n, 4096, 0, 4, 4, 16, 8, 1, 0, 0};
      Config measured, asked;
      if (config_of(table, shape, gpu, measured)) return 1;
      shape.tactic = tactic_from_config(measured);
      if (config_of(table, shape, gpu, asked) || asked.kernel != measured.kernel || asked.shares != measured.shares) return 2;
      const bool rule = measured.kernel == qqq_choose(shape, gpu);
      std::printf("%d %d: %s %s\\n", n, room >> 10, table.name(measured.kernel), rule ? "by rule" : measured.shares == 3 ? "3" : "?");
    }
}
"""


def output_of(folder: Path, text: str) -> list[str]:
    """Lines that a C++ program prints; headers of `folder` come before those of plugins/."""
    source, program = folder / "main.cpp", folder / "program"
    source.write_text(text)
    include = [f"-I{folder}", f"-I{PLUGINS}", "-isystem", str(find_cuda_include())]
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            *include,
            str(source),
            "-o",
            str(program),
        ],
        check=True,
    )
    return subprocess.run(
        [str(program)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_rows_that_the_benchmark_writes_are_found(tmp_path: Path) -> None:
    w4 = SCHEMES[0]

    def row(m: int, kernel: str, shares: int, median: float) -> dict[str, object]:
        return {
            "scheme": w4.name,
            "n": 4096,
            "k": 4096,
            "m": m,
            "kernel": kernel,
            "tactic": 64 * 2 + shares,
            "median": median,
            "complete": True,
        }

    rows = [
        row(1, "int8 64x16", 4, 9.0),
        row(1, "int8 64x8", 5, 8.0),
        row(16, "int8 64x16", 3, 9.0),
        row(2048, "int8 256x64", 2, 20.0),
    ]
    rows.append({**row(16, "int8 64x16", 3, 9.0), "n": 8192})
    rows.append(
        {**row(32, "int8 64x16", 3, 9.0), "complete": False}
    )  # the fastest of those that there was time for
    rows.append({**row(1, "cuBLAS", 0, 1.0), "scheme": "fp16"})
    lines = measured_rows(
        {
            "device": "GPU",
            "date": "today",
            "capability": "9.0",
            "multiprocessors": 132,
            "rows": rows,
        },
        [w4],
    )
    assert (
        lines[0]
        == '{90, 132, "QQQGemm", 4, 16, 8, 0, 4096, 4096, 1, "int8 64x8", 5},  // GPU, today'
    )
    (tmp_path / "rows.inc").write_text(merged_table("", lines))
    assert output_of(tmp_path, LOOKUP) == [
        "1: int8 64x8 5",
        "2: int8 64x16 3",
        "8: int8 64x16 3",
        "16: int8 64x16 3",
        "17: int8 256x64 2",
        "5000: int8 256x64 2",
        "10000",
    ]


def test_the_library_takes_measured_kernels_where_they_run(tmp_path: Path) -> None:
    """A row that fits is taken, and named by a tactic too; one whose kernel the GPU lacks room for,
    or that is gone, is not.
    """
    (tmp_path / "core" / "host").mkdir(parents=True)
    rows = [
        f'{{90, 132, "QQQGemm", 4, 16, 8, 0, {n}, 4096, 8, "{kernel}", 3}},'
        for n, kernel in ((4096, "int8 256x64"), (4097, "gone"))
    ]
    (tmp_path / "core" / "host" / "measured.inc").write_text(merged_table("", rows))
    assert output_of(tmp_path, CHOICE) == [
        "4096 227: int8 256x64 3",
        "4096 64: int8 64x8 by rule",
        "4097 227: int8 64x8 by rule",
        "4097 64: int8 64x8 by rule",
        "4098 227: int8 64x8 by rule",
        "4098 64: int8 64x8 by rule",
    ]


def test_what_was_measured_elsewhere_stays() -> None:
    def row(sm: int, m: int, kernel: str) -> str:
        return (
            f'{{{sm}, 132, "QQQGemm", 4, 16, 8, 0, 4096, 4096, {m}, "{kernel}", 5}},  // GPU, today'
        )

    first = merged_table(
        (PLUGINS / "core" / "host" / "measured.inc").read_text(),
        [row(80, 1, "a"), row(90, 1, "a"), row(90, 16, "b")],
    )
    second = merged_table(first, [row(90, 1, "c"), row(90, 2, "d")])
    assert second.splitlines()[1:] == [
        row(80, 1, "a"),
        row(90, 1, "c"),
        row(90, 16, "b"),
        row(90, 2, "d"),
    ]
    assert (
        first.splitlines()[0]
        == second.splitlines()[0]
        == (PLUGINS / "core" / "host" / "measured.inc").read_text().splitlines()[0]
    )
