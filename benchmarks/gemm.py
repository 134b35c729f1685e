"""Speed of the low-bit GEMM kernels against cuBLAS, on the GPU of this machine; every result is checked before it is timed.

python -m benchmarks.gemm [--quick] [--shapes NAME ...] [--tokens M ...] [--schemes NAME ...] [--tactics [--table FILE]] [--seconds 420]
python -m benchmarks.gemm --check-only [--sim]

Needs PyTorch, numpy, ml_dtypes and nvcc; neither TensorRT nor a network. Kernel time with the quantisation of the activations
included, weights cold in the second-level cache, launches in a CUDA graph, median of its replays. Peers in the same run: cuBLAS in
fp16 and int8, and each kernel's own simple form. --tactics times every kernel that can run a shape, not only the one that is chosen;
with --table FILE the fastest become rows for plugins/core/measured.inc, which the library consults before its own rules.
--check-only compares with numpy and times nothing; with --sim on the CPU, at small shapes. Prints a table of the targets last; writes
benchmarks/results/gemm-<device>-<date>.json after each shape and a plot beside it. Exit code 3: a wrong result or a missed target.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gemm_cases import QUICK_SHAPES, QUICK_TOKENS, SCHEMES, SHAPES, TARGET_SHAPE, TOKENS, Scheme
from benchmarks.gemm_kernels import SIMPLE, Kernels, Layer, check
from benchmarks.gemm_plot import plot
from plugins.core.cli import run_cli, whole_number
from plugins.core.errors import EXIT_CHECK, InputError

__all__ = ["main", "measured_rows", "merged_table", "target_table"]

HERE = Path(__file__).resolve().parent
_SIM_SHAPES, _SIM_TOKENS = {"sim": (130, 256), "sim wide": (64, 640)}, [1, 3, 17]
_TABLE_HEADER = ("// Rows of kMeasured (core/measured.h), written by: "
                 "python -m benchmarks.gemm --tactics --table plugins/core/measured.inc")
_MOST_SIMPLE_WORK = 1 << 33  # multiplications of the simple kernels, which are slow


class Run:
    """One run: its kernels, its time budget, and the result file, brought up to date after each shape."""

    def __init__(self, args: argparse.Namespace, kernels: Kernels, shapes: dict[str, tuple[int, int]], tokens: list[int]) -> None:
        self.args, self.kernels, self.shapes, self.tokens = args, kernels, shapes, tokens
        self.schemes = [scheme for scheme in SCHEMES if not args.schemes or scheme.name in args.schemes]
        self.budget = args.seconds / (len(shapes) * len(tokens) * (len(self.schemes) + 2) * 3)  # set-up and checks take the rest
        self.rows: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}

    def start(self) -> None:
        """Measure the device's own limits first."""
        from benchmarks.gemm_timing import copy_bandwidth, matmul_rate

        properties, date = torch.cuda.get_device_properties(0), datetime.date.today().isoformat()
        device = re.sub(r"\W+", "-", properties.name.lower())
        self.result = {"date": date, "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
                       "multiprocessors": properties.multi_processor_count, "torch": torch.__version__, "cuda": torch.version.cuda,
                       "copy_gb_per_s": round(copy_bandwidth(), 1), "fp16_tflops": round(matmul_rate(), 1), "rows": self.rows}
        self.path: Path = self.args.results / f"gemm-{device}-{date}.json"
        copies, matmul = self.result["copy_gb_per_s"], self.result["fp16_tflops"]
        print(f"{properties.name}: copies at {copies} GB/s, fp16 matmul at {matmul} TFLOP/s", flush=True)

    def check(self) -> int:
        """Compare every tactic with numpy; returns how many were."""
        count = 0
        for name, (n, k) in self.shapes.items():
            for scheme in self.schemes:
                layer = Layer(self.kernels, scheme, n, k, 1)
                for m in self.tokens:
                    x = layer.tokens(m)
                    for tactic in self.kernels.tactics(scheme.op, layer.attrs, m):
                        if tactic != SIMPLE or m * n * k <= _MOST_SIMPLE_WORK:
                            check(layer, x, tactic)
                            count += 1
            print(f"{name}: right", flush=True)
        return count

    def measure(self) -> None:
        """Time everything, shape by shape."""
        for name, (n, k) in self.shapes.items():
            began = time.monotonic()
            self._measure_shape(name, n, k)
            self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

    def _measure_shape(self, name: str, n: int, k: int) -> None:
        from benchmarks.gemm_timing import Peers, copies_for

        peers = Peers(n, k)
        fp16 = {}
        for m in self.tokens:
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            for peer, took in peers.times(x, self.budget).items():
                self.rows.append({"shape": name, "n": n, "k": k, "m": m, "scheme": peer, "kernel": "cuBLAS", **asdict(took)})
                if peer == "fp16":
                    fp16[m] = took.median
        del peers
        torch.cuda.empty_cache()
        for scheme in self.schemes:
            layer = Layer(self.kernels, scheme, n, k, copies_for(int(n * k * scheme.weight_bits(k) / 8)))
            for m in self.tokens:
                self._measure_layer(name, layer, m, fp16[m])
            del layer
            torch.cuda.empty_cache()

    def _measure_layer(self, name: str, layer: Layer, m: int, fp16: float) -> None:
        from benchmarks.gemm_timing import time_calls

        scheme, n, k = layer.scheme, layer.attrs.out_features, layer.attrs.in_features
        x, tactics = layer.tokens(m), self.kernels.tactics(layer.scheme.op, layer.attrs, m)
        simple = tactics.pop(SIMPLE, None) is not None and m * n * k <= _MOST_SIMPLE_WORK
        wanted = (list(tactics) if self.args.tactics else list(tactics)[:1]) + ([SIMPLE] if simple and m in (1, 16) else [])
        for place, tactic in enumerate(wanted):
            check(layer, x, tactic)
            _, run = layer.prepare(x, tactic)
            took = time_calls(run, self.budget, 2 if tactic == SIMPLE else 20)
            moved = n * k * scheme.weight_bits(k) / 8 + 2 * m * (n + k)
            speed = {"speedup": round(fp16 / took.median, 3), "gb_per_s": round(moved / took.median / 1e3, 1),
                     "tops": round(2 * m * n * k / took.median / 1e6, 1)}
            self.rows.append({"shape": name, "n": n, "k": k, "m": m, "scheme": scheme.name, "kernel": tactics.get(tactic, "simple"),
                              "tactic": tactic, "chosen": place == 0 and tactic != SIMPLE, **asdict(took), **speed})


def target_table(rows: Sequence[dict[str, Any]], schemes: Sequence[Scheme] = SCHEMES) -> tuple[str, int]:
    """Speed-up over fp16 at the target shape, against the targets; and how many of those were missed."""
    lines, missed = [f"{TARGET_SHAPE}: speed-up over fp16 (target)"], 0
    for scheme in schemes:
        mine = [row for row in rows if row["shape"] == TARGET_SHAPE and row["scheme"] == scheme.name and row.get("chosen")]
        cells = []
        for row in mine:
            target = scheme.target(row["m"])
            short = target is not None and row["speedup"] < target
            missed += short
            cells.append(f"M={row['m']}: {row['speedup']:.2f}" + (f" ({target}{' MISSED' if short else ''})" if target else ""))
        if cells:
            lines.append(f"{scheme.name:<12} " + "  ".join(cells))
    return "\n".join(lines), missed


def measured_rows(result: dict[str, Any], schemes: Sequence[Scheme]) -> list[str]:
    """Rows of plugins/core/measured.inc: for each scheme, shape and number of tokens the tactic with the smallest median."""
    lines, gpu = [], f"{result['capability'].replace('.', '')}, {result['multiprocessors']}"
    for scheme in schemes:
        best: dict[tuple[int, int, int], dict[str, Any]] = {}
        for row in result["rows"]:
            place = row["n"], row["k"], row["m"]
            if row["scheme"] == scheme.name and (place not in best or row["median"] < best[place]["median"]):
                best[place] = row
        for (n, k, m), row in sorted(best.items()):
            numbers = ", ".join(map(str, (scheme.wbits, scheme.levels, scheme.abits, scheme.group_size, n, k, m)))
            lines.append(f'{{{gpu}, "{scheme.op}", {numbers}, "{row["kernel"]}", {row["tactic"] % 64}}},'
                         f"  // {result['device']}, {result['date']}")
    return lines


def merged_table(old: str, rows: Sequence[str]) -> str:
    """The table `old` with `rows` in place of those for the same GPU, weights and tokens; what was measured elsewhere stays."""
    known = [line for line in old.splitlines() if line.startswith("{")]
    merged = {line.partition("  //")[0].rsplit(", ", 2)[0]: line for line in [*known, *rows]}  # by all but kernel and shares
    return "\n".join([_TABLE_HEADER, *merged.values()]) + "\n"


def _library(args: argparse.Namespace) -> str:
    from plugins.build import build_library, build_sim

    if args.sim:
        return str(build_sim())
    if not torch.cuda.is_available():
        raise InputError("benchmarks.gemm", "got no CUDA device, expected one", "Run it on a GPU; without one: --check-only --sim")
    major, minor = torch.cuda.get_device_capability()
    return str(build_library("90a" if major == 9 else f"{major}{minor}"))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"two shapes, M = {', '.join(map(str, QUICK_TOKENS))}")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="NAME", help=", ".join(SHAPES))
    add("--tokens", nargs="+", type=whole_number(1), metavar="M")
    add("--schemes", nargs="+", choices=[scheme.name for scheme in SCHEMES], metavar="NAME", help=", ".join(s.name for s in SCHEMES))
    add("--tactics", action="store_true", help="time every kernel, not only the chosen one")
    add("--table", type=Path, metavar="FILE", help="with --tactics: put the fastest kernels into this plugins/core/measured.inc")
    add("--seconds", type=whole_number(1), default=420, help="of timing, about (default 420; --quick 90)")
    add("--check-only", action="store_true")
    add("--sim", action="store_true", help="with --check-only: the kernels on the CPU, small shapes")
    add("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    if args.sim and not args.check_only:
        raise InputError("--sim", "got it without --check-only, expected both: the simulation has no speed", "Add --check-only")
    if args.table and not args.tactics:
        raise InputError("--table", "got it without --tactics, expected both: one kernel of each shape says nothing", "Add --tactics")
    library = _library(args)
    if args.quick:
        args.seconds = min(args.seconds, 90)
    names = args.shapes or (QUICK_SHAPES if args.quick else list(SHAPES))
    shapes = _SIM_SHAPES if args.sim else {name: SHAPES[name] for name in names}
    tokens = args.tokens or (_SIM_TOKENS if args.sim else QUICK_TOKENS if args.quick else TOKENS)
    run = Run(args, Kernels(library, "cpu" if args.sim else "cuda"), shapes, tokens)
    if args.check_only:
        print(f"{run.check()} results compared, all right")
        return 0
    run.start()
    run.measure()
    text, missed = target_table(run.rows, run.schemes)
    plot(run.result, run.path.with_suffix(".svg"))
    if args.table:
        old = args.table.read_text(encoding="utf-8") if args.table.exists() else ""
        args.table.write_text(merged_table(old, measured_rows(run.result, run.schemes)), encoding="utf-8")
    print(f"\n{text}\nwritten to {run.path} and {run.path.with_suffix('.svg').name}")
    return EXIT_CHECK if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
